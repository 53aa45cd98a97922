# SPDX-License-Identifier: Apache-2.0
"""The ranks of a group in several processes: the same bits as the oracle, whoever owns which."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_smfree.testing import chaos
from property.expectations import (
    assert_dispatched,
    assert_rounded,
    assert_same_bits,
    assert_summed_in_order,
)
from property.round_trip import Program, Shape
from property.strategies import random_inputs
from support import random_routing


def cpus(processes, devices):
    return pytest.mark.multihost(processes=processes, devices_per_process=devices)


def gpus(processes):
    return pytest.mark.multihost(processes=processes, devices_per_process=1, platform="cuda")


SHAPES = [
    (Shape(2, 8, 3, 7, 16, "float32"), cpus(2, 1)),
    (Shape(4, 8, 2, 6, 33, "bfloat16", alignment=4), cpus(2, 2)),
    (Shape(4, 4, 4, 5, 8, "float16", capacity=9), cpus(4, 1)),
    (Shape(3, 6, 2, 5, 8, "float32", unused_tokens=4), cpus(3, 1)),
    (Shape(4, 8, 2, 50, 900, "bfloat16"), cpus(2, 2)),
    (Shape(4, 8, 6, 6, 33, "bfloat16", ranks_per_node=2), cpus(2, 2)),
    (Shape(4, 8, 3, 7, 8, "float16", ranks_per_node=2), cpus(4, 1)),
    (Shape(8, 16, 8, 6, 16, "float32", ranks_per_node=2), cpus(4, 2)),
    (Shape(4, 8, 3, 7, 8, "float32", capacity=24, ranks_per_node=2, layout="padded"), cpus(2, 2)),
    # As many ranks as the largest models are trained with.
    (Shape(64, 128, 8, 5, 16, "float32", capacity=120), cpus(1, 64)),
    (Shape(64, 128, 8, 5, 16, "bfloat16", ranks_per_node=8), cpus(2, 32)),
    (Shape(2, 8, 3, 7, 16, "float32"), gpus(2)),
    (Shape(2, 8, 2, 50, 900, "bfloat16"), gpus(2)),
    (Shape(2, 4, 2, 5, 8, "float16", capacity=9), gpus(2)),
    # Nodes of one GPU: all peers are far.
    (Shape(2, 8, 3, 7, 16, "float32", ranks_per_node=1), gpus(2)),
    (Shape(2, 8, 2, 50, 900, "bfloat16", ranks_per_node=1), gpus(2)),
    (Shape(2, 4, 2, 5, 8, "float16", capacity=9, ranks_per_node=1), gpus(2)),
    (Shape(2, 8, 3, 7, 16, "bfloat16", alignment=4, layout="padded"), gpus(2)),
    (Shape(4, 8, 3, 7, 16, "float32"), gpus(4)),
    (Shape(4, 8, 2, 6, 33, "bfloat16", alignment=4), gpus(4)),
    (Shape(4, 8, 3, 7, 16, "float32", ranks_per_node=2, direct=True), gpus(4)),
    (Shape(4, 8, 2, 6, 33, "bfloat16", ranks_per_node=2, direct=True), cpus(2, 2)),
    (Shape(4, 8, 6, 6, 33, "bfloat16", alignment=4, ranks_per_node=2), gpus(4)),
    (Shape(4, 8, 3, 7, 8, "float16", capacity=9, ranks_per_node=2), gpus(4)),
    (Shape(4, 16, 8, 700, 16, "float32", ranks_per_node=2), gpus(4)),
    # The GPU puts.
    (Shape(2, 8, 2, 50, 900, "bfloat16", ranks_per_node=1, puts="device"), gpus(2)),
    (Shape(4, 8, 3, 7, 16, "float32", ranks_per_node=2, direct=True, puts="device"), gpus(4)),
    (Shape(4, 8, 6, 6, 33, "bfloat16", ranks_per_node=2, puts="device"), gpus(4)),
]
PARAMETERS = [
    pytest.param(
        shape, marks=[where, getattr(pytest.mark, f"{where.kwargs.get('platform', 'cpu')}_only")]
    )
    for shape, where in SHAPES
]


@pytest.mark.parametrize("shape", PARAMETERS, ids=str)
def test_round_trip(shape, world):
    """Dispatch, combine and all gradients, with silent ranks, quiet movers and chaotic ones."""
    program = Program(shape)
    rng = np.random.default_rng(0)  # the same everywhere
    with program.group:
        for none_fraction in (0.0, 0.3, 1.0):
            idx = random_routing(rng, shape.ranks * shape.tokens, shape.top_k, shape.experts)
            idx[rng.random(idx.shape) < none_fraction] = -1
            idx = idx.reshape(shape.ranks, shape.tokens, shape.top_k)
            case = random_inputs(rng, shape, program.num_rows, idx)
            routing = shape.route(idx)
            first, on_other_lane_with_hooks = program(case)
            assert_dispatched(shape, case, first.d, routing)
            assert_rounded(shape, case, first, routing)
            assert_summed_in_order(case, first, routing, shape.ranks_per_sum)
            assert_same_bits(on_other_lane_with_hooks, first)
            if program.group.backend != "cpu":
                continue
            with chaos(program.group, seed=world.rank, max_delay_us=500):
                assert_same_bits(program(case), [first, first])
                world.barrier()  # what one process holds back, another one waits for
        program.group.check()
        world.barrier()


def own_shards(tree):
    return jax.tree.map(lambda a: np.concatenate([s.data for s in a.addressable_shards]), tree)


CHUNKED = Shape(2, 4, 1, 2100, 8192, "bfloat16", capacity=2300)


@pytest.mark.cuda_only
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(CHUNKED, marks=gpus(2)),
        pytest.param(dataclasses.replace(CHUNKED, ranks_per_node=1), marks=gpus(2)),
        pytest.param(dataclasses.replace(CHUNKED, ranks_per_node=1, puts="device"), marks=gpus(2)),
        pytest.param(
            dataclasses.replace(CHUNKED, ranks_per_node=1, puts="device", wire=1500), marks=gpus(2)
        ),
        pytest.param(dataclasses.replace(CHUNKED, ranks=4, ranks_per_node=2), marks=gpus(4)),
        pytest.param(
            dataclasses.replace(CHUNKED, ranks=4, ranks_per_node=2, wire=1500), marks=gpus(4)
        ),
        pytest.param(
            dataclasses.replace(CHUNKED, ranks=4, ranks_per_node=2, wire=1500, puts="device"),
            marks=gpus(4),
        ),
    ],
    ids=str,
)
def test_messages_in_chunks(shape, world):
    """Messages of three chunks, again and again, with the bits of messages that come as a whole."""
    rng = np.random.default_rng(0)
    chunked, whole = Program(shape, sm_push_bytes=0), Program(shape, sm_push_bytes=2**30)
    with chunked.group, whole.group:
        idx = random_routing(rng, shape.ranks * shape.tokens, shape.top_k, shape.experts)
        idx[rng.random(idx.shape) < 0.1] = -1
        idx = idx.reshape(shape.ranks, shape.tokens, shape.top_k)
        case = random_inputs(rng, shape, chunked.num_rows, idx)
        expected = own_shards(whole.run(case))
        for _ in range(3):
            assert_same_bits(own_shards(chunked.run(case)), expected)
        chunked.group.check()
        world.barrier()


@pytest.mark.cuda_only
@gpus(4)
def test_relays_of_many_rows(world):
    """More tiles of rows to relay than blocks that run at once."""
    shape = Shape(4, 8, 2, 36_000, 8, "float32", capacity=50_000, ranks_per_node=2)
    program = Program(shape)
    rng = np.random.default_rng(0)
    with program.group:
        idx = random_routing(rng, shape.ranks * shape.tokens, shape.top_k, shape.experts)
        idx = idx.reshape(shape.ranks, shape.tokens, shape.top_k)
        case = random_inputs(rng, shape, program.num_rows, idx)
        routing = shape.route(idx)
        first, again = program(case)
        assert_dispatched(shape, case, first.d, routing)
        assert_summed_in_order(case, first, routing, shape.ranks_per_sum)
        assert_same_bits(again, first)
        program.group.check()
        world.barrier()
