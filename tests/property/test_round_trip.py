# SPDX-License-Identifier: Apache-2.0
"""Random routings and values: right to the bit or to the last rounding, and always the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from property.expectations import (
    assert_dispatched,
    assert_rounded,
    assert_same_bits,
    assert_summed_in_order,
)
from property.round_trip import Program, Shape
from property.strategies import examples, inputs
from support import chaos_on_cpu

SMALL = [
    Shape(1, 4, 3, 5, 8, "float32"),
    Shape(2, 8, 8, 6, 16, "bfloat16", alignment=4),
    Shape(3, 9, 2, 5, 24, "float16", unused_tokens=3),
    Shape(4, 4, 4, 6, 8, "float32", capacity=7),
    Shape(4, 16, 6, 8, 33, "bfloat16", unused_tokens=9),
    Shape(5, 10, 5, 4, 16, "float32", alignment=3),
    Shape(6, 12, 7, 3, 7, "float16", alignment=2, capacity=10),
    Shape(7, 7, 1, 9, 5, "bfloat16", capacity=8),
    Shape(8, 16, 8, 4, 16, "float32", alignment=2),
    Shape(8, 64, 4, 8, 64, "bfloat16", alignment=8, capacity=96),
    Shape(4, 8, 3, 6, 16, "float32", wire=11),
    Shape(8, 16, 4, 4, 8, "bfloat16", alignment=2, wire=9, capacity=14, unused_tokens=2),
    Shape(4, 8, 3, 6, 16, "float32", layout="padded"),
    Shape(2, 8, 8, 6, 16, "bfloat16", alignment=5, unused_tokens=3, layout="padded"),
    Shape(4, 16, 6, 8, 33, "float16", alignment=2, capacity=40, layout="padded"),
    Shape(8, 16, 4, 4, 8, "bfloat16", wire=9, capacity=10, layout="padded"),
    pytest.param(Shape(4, 8, 6, 6, 16, "bfloat16", ranks_per_node=2), marks=pytest.mark.cpu_only),
    pytest.param(
        Shape(6, 12, 7, 3, 7, "float16", wire=8, ranks_per_node=3), marks=pytest.mark.cpu_only
    ),
    pytest.param(
        Shape(8, 16, 4, 4, 8, "float32", wire=13, capacity=16, ranks_per_node=2),
        marks=pytest.mark.cpu_only,
    ),
    pytest.param(
        Shape(6, 12, 7, 3, 7, "float16", alignment=2, capacity=10, ranks_per_node=3),
        marks=pytest.mark.cpu_only,
    ),
    pytest.param(
        Shape(8, 16, 8, 4, 16, "float32", unused_tokens=5, ranks_per_node=2),
        marks=pytest.mark.cpu_only,
    ),
    pytest.param(
        Shape(6, 12, 7, 3, 7, "float16", wire=8, capacity=12, ranks_per_node=3, layout="padded"),
        marks=pytest.mark.cpu_only,
    ),
]
LARGE = [
    Shape(1, 4, 2, 160, 1800, "float32"),  # more than 1 MiB: several threads per rank
    Shape(4, 8, 2, 50, 1030, "bfloat16", capacity=150),
]


@pytest.fixture(scope="module")
def program(request):
    program = Program(request.param)
    with program.group:
        yield program


def check(program, case, seed):
    shape = program.shape
    first, on_other_lane_with_hooks = program(case)
    routing = shape.route(case.topk_idx)
    assert_dispatched(shape, case, first.d, routing)
    assert_rounded(shape, case, first, routing)
    assert_summed_in_order(case, first, routing, shape.ranks_per_sum)
    assert_same_bits(on_other_lane_with_hooks, first)

    assert_same_bits(program(case), [first, first])
    with chaos_on_cpu(program.group, seed=seed, max_delay_us=200):
        assert_same_bits(program(case), [first, first])
    program.group.check()


@pytest.mark.parametrize("program", SMALL, ids=str, indirect=True)
@examples(40)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_small(program, data, seed):
    check(program, data.draw(inputs(program.shape, program.num_rows)), seed)


@pytest.mark.parametrize("program", LARGE, ids=str, indirect=True)
@examples(4)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_large(program, data, seed):
    check(program, data.draw(inputs(program.shape, program.num_rows)), seed)
