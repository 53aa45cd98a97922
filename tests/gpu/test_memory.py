# SPDX-License-Identifier: Apache-2.0
"""What a group takes of a GPU's memory: as much as it says, all of it given back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from faults.running import CONFIG, assert_works, round_trip
from gpu.driver import free_bytes
from support import as_many, ep_mesh, make_problem

pytestmark = pytest.mark.cuda_only

PAGE = 2 << 20
SIZES = {"num_experts": 8, "top_k": 2, "hidden": 4096, "max_tokens": 4096, "num_lanes": 4}


@pytest.mark.parametrize("config", [{}, {"num_sets": 4}, {"num_sets": 1, "dtype": jnp.float32}])
def test_report(groups, config):
    """The buffers that other ranks reach are those of the size hint, in whole pages.

    A group begins with a set for each lane, and has room for the signals of 32.
    """
    group = groups(ep_mesh(as_many(4)), **SIZES, **config)
    report = group.memory_report()
    sets = config.get("num_sets", SIZES["num_lanes"])
    hint = smfree.nvl_size_hint(dataclasses.replace(group.config, num_sets=sets), group.num_ranks)
    per_rank = report["device_bytes"] / group.num_ranks
    assert per_rank % PAGE == 0 and hint <= per_rank < hint + 2 * PAGE
    assert 0 < report["scratch_bytes"] < report["device_bytes"] / 10
    assert 0 < report["pinned_bytes"] < report["device_bytes"] / 10


def grown_by(group, problem, number):
    """The bytes and sets that a group gets for a program with so many operations in flight."""

    def together(*arrays):
        tokens = [smfree.dispatch_send(group.token(), *arrays) for _ in range(number)]
        behind = sum(token.array for token in tokens)  # no recv before the last send
        tokens = [dataclasses.replace(t, array=t.array + 0 * behind) for t in tokens]
        received = [smfree.dispatch_recv(token)[0].x for token in tokens]
        return functools.reduce(jnp.minimum, received), functools.reduce(jnp.maximum, received)

    before = group.memory_report()["device_bytes"], group.stats()["sets_added"]
    smap = jax.shard_map(together, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep"))
    step = jax.jit(smap).lower(*problem.arrays[:3]).compile()
    after = group.memory_report()["device_bytes"], group.stats()["sets_added"]
    for _ in range(3):
        least, most = step(*problem.arrays[:3])
        np.testing.assert_array_equal(least, most)
    group.check()
    assert (group.memory_report()["device_bytes"], group.stats()["sets_added"]) == after
    return tuple(now - then for now, then in zip(after, before, strict=True))


def test_sets_are_made_when_a_program_is_compiled(groups):
    """As many as it has operations in flight together; nothing is made when it runs."""
    mesh = ep_mesh(as_many(4, at_least=2))
    sizes = {"num_experts": 8, "top_k": 2, "hidden": 1024, "max_tokens": 1024, "dtype": jnp.float32}
    group = groups(mesh, **sizes, sm_push_bytes=0)
    problem = make_problem(mesh, tokens=1024, top_k=2, hidden=1024)
    one, two = (
        smfree.nvl_size_hint(dataclasses.replace(group.config, num_sets=sets), mesh.size)
        for sets in (1, 2)
    )
    assert grown_by(group, problem, 1) == (0, 0)
    grown, sets = grown_by(group, problem, 6)
    assert sets == 5
    assert abs(grown - 5 * (two - one) * mesh.size) < 6 * PAGE * mesh.size
    assert grown_by(group, problem, 4) == (0, 0)


def test_a_captured_graph_takes_sets_that_came_later(groups):
    """A program runs, and runs again when another one has left an operation in flight."""
    group = groups(ep_mesh(as_many(4)), **CONFIG)
    arrays = make_problem(group.mesh).arrays[:3]
    spec, rows = group.token_spec, P("ep")

    def local(function, in_specs, out_specs):
        return jax.jit(
            jax.shard_map(function, mesh=group.mesh, in_specs=in_specs, out_specs=out_specs)
        )

    def several(*arrays):  # enough calls for XLA to capture them
        out = arrays[0]
        for _ in range(3):
            out = round_trip(group.token(), out, *arrays[1:])
        return out

    step = local(several, (rows,) * 3, rows)
    expected = [np.asarray(step(*arrays)) for _ in range(5)][-1]
    send = local(smfree.dispatch_send, (spec, *[rows] * 3), spec)
    token = send(group.token(), *arrays)
    for _ in range(3):
        np.testing.assert_array_equal(step(*arrays), expected)
    receive = local(lambda token: smfree.dispatch_recv(token)[0].x, (spec,), rows)
    jax.block_until_ready(receive(token))
    group.check()


def test_more_in_flight_than_there_can_be_sets(groups):
    """It is an error when the program is compiled, and the group goes on."""
    mesh = ep_mesh(as_many(4, at_least=2))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)
    with pytest.raises(jax.errors.JaxRuntimeError, match="33 operations in flight together"):
        grown_by(group, problem, 33)
    assert_works(group)


def test_no_memory_for_a_program(groups):
    """It is an error when the program is compiled, and the group goes on."""
    mesh = ep_mesh(as_many(4, at_least=2))
    sizes = CONFIG | {"hidden": 32768, "max_tokens": 16384}  # 8 GiB for each set
    group = groups(mesh, **sizes, recv_capacity=64)
    with pytest.raises(jax.errors.JaxRuntimeError, match="XLA_PYTHON_CLIENT_MEM_FRACTION"):
        grown_by(group, make_problem(mesh), 32)
    assert_works(group)


def test_memory_comes_back():
    mesh = ep_mesh(as_many(4))
    config = smfree.EpConfig(**SIZES)
    smfree.EpGroup.create(mesh, config=config).close()  # kernels are loaded once
    before = free_bytes(0)
    for _ in range(3):
        with smfree.EpGroup.create(mesh, config=config):
            assert free_bytes(0) < before
    hint = smfree.nvl_size_hint(config, mesh.size)
    assert free_bytes(0) > before - hint // 2


def test_too_large(groups):
    """The error says what to lower, and what else wants memory."""
    with pytest.raises((smfree.SmfreeError, ValueError)) as refused:
        groups(ep_mesh(as_many(4)), **SIZES | {"hidden": 1 << 22})
    for word in ("max_tokens", "num_lanes", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        assert word in str(refused.value)
