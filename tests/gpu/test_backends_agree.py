# SPDX-License-Identifier: Apache-2.0
"""The same operations through a CPU group and a CUDA group: the same bits.

But for the gradients of weights: sums over ``hidden``, whose order is open. These are within the
roundings of such a sum.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_smfree as smfree
from property.expectations import assert_rounded, assert_same_bits
from property.round_trip import Program, Shape
from property.strategies import examples, inputs

pytestmark = pytest.mark.cuda_only

SMALL = [
    Shape(1, 4, 3, 5, 8, "float32"),
    Shape(1, 4, 2, 8, 5, "float32", capacity=10, overflow="error"),
    Shape(1, 8, 4, 33, 40, "bfloat16", alignment=8, capacity=72),
    Shape(2, 8, 8, 6, 16, "bfloat16", alignment=4),
    Shape(2, 6, 2, 40, 136, "float16", capacity=50),
    Shape(2, 4, 2, 8, 4, "float32", capacity=14, overflow="error"),
    Shape(4, 4, 4, 6, 8, "float32", capacity=7),
    Shape(4, 16, 6, 8, 33, "bfloat16", unused_tokens=9),
    Shape(4, 8, 3, 6, 20, "float16", alignment=2, capacity=20, overflow="error"),
    Shape(1, 8, 4, 33, 40, "bfloat16", layout="padded"),
    Shape(1, 4, 3, 5, 8, "float32", capacity=8, layout="padded"),
    Shape(2, 8, 8, 6, 16, "bfloat16", alignment=4, layout="padded"),
    Shape(2, 6, 2, 40, 136, "float16", capacity=60, alignment=2, layout="padded"),
    Shape(4, 64, 8, 64, 33, "float32", layout="padded"),
    Shape(4, 8, 3, 300, 24, "bfloat16", ranks_per_node=2),
    Shape(4, 8, 3, 40, 20, "float32", wire=60, ranks_per_node=2),  # relays have too many rows
]
FEW_ROWS = [  # at the edges of what has one kernel per phase (csrc/cuda/host/small.h)
    Shape(1, 16, 8, 1, 24, "bfloat16"),
    Shape(2, 16, 8, 1, 24, "bfloat16", layout="padded"),
    Shape(2, 256, 8, 128, 7168, "bfloat16"),
    Shape(1, 16, 8, 512, 24, "bfloat16", capacity=3000),  # the most slots
    Shape(1, 16, 8, 513, 24, "bfloat16", capacity=3000),
    Shape(2, 16, 8, 512, 24, "float32"),
    Shape(2, 16, 8, 513, 24, "float32"),
    Shape(2, 248, 4, 992, 8, "float16", alignment=4),  # the most bits
    Shape(2, 248, 4, 993, 8, "float16", alignment=4),
    Shape(2, 8, 4, 200, 24, "float32", wire=150, overflow="drop"),  # not all rows are kept
    Shape(2, 8, 4, 200, 24, "bfloat16", capacity=320, alignment=8, layout="padded"),
]
LARGE = [  # messages of several chunks
    Shape(1, 16, 8, 150, 520, "float16", unused_tokens=7),
    Shape(2, 8, 2, 400, 2048, "bfloat16"),
    Shape(4, 64, 8, 64, 1024, "bfloat16", alignment=8),
    Shape(4, 8, 2, 1500, 8192, "bfloat16", wire=2000, ranks_per_node=2),
]


@pytest.fixture(scope="module")
def programs(request):
    """Two for CUDA, in one of which copy engines carry even the smallest rows; one for the CPU."""
    shape = request.param
    made = Program(shape, "cuda"), Program(shape, "cuda", sm_push_bytes=0), Program(shape, "cpu")
    with made[0].group, made[1].group, made[2].group:
        yield made


@pytest.mark.parametrize("programs", SMALL, ids=str, indirect=True)
@examples(20)
@given(data=st.data())
def test_small(programs, data):
    check(programs, data)


@pytest.mark.parametrize("programs", FEW_ROWS, ids=str, indirect=True)
@examples(3)
@given(data=st.data())
def test_few_rows(programs, data):
    check(programs, data)


@pytest.mark.parametrize("programs", LARGE, ids=str, indirect=True)
@examples(3)
@given(data=st.data())
def test_large(programs, data):
    check(programs, data)


def check(programs, data):
    *on_gpus, on_cpu = programs
    shape = on_cpu.shape
    case = data.draw(inputs(shape, on_cpu.num_rows))
    routing = shape.route(case.topk_idx)
    poisoned = shape.overflow == "error" and routing.num_dropped.any()
    expected, _ = on_cpu(case)
    for actual in itertools.chain.from_iterable(program(case) for program in on_gpus):
        if poisoned:
            assert_same_bits(nans_alike(actual), nans_alike(without_weights_ct(expected)))
        else:
            assert_same_bits(without_weights_ct(actual), without_weights_ct(expected))
            assert_rounded(shape, case, actual, routing)
    for program in programs:
        if poisoned:
            with pytest.raises(smfree.SmfreeError, match="recv_capacity"):
                program.group.check()
        program.group.check()


def without_weights_ct(outputs):
    return dataclasses.replace(outputs, weights_ct=None, topk_weights_ct=None)


def nans_alike(outputs):
    """The bits of a NaN that stands for rows that did not fit are open."""

    def alike(array):
        if np.issubdtype(array.dtype, np.integer):
            return array
        return np.where(np.isnan(array), np.array(np.nan, array.dtype), array)

    return jax.tree.map(alike, without_weights_ct(outputs))
