# SPDX-License-Identifier: Apache-2.0
"""Portable groups have the bits of the CPU backend.

But for the gradients of weights: sums over ``hidden``, whose order is open. These are within the
roundings of such a sum. And any NaN is as good as another one: older XLA for CPUs changes the bits
of those of 16 bits.
"""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_smfree as smfree
from property.expectations import assert_rounded, assert_same_bits
from property.round_trip import Program, Shape
from property.strategies import examples, inputs
from support import portable

pytestmark = pytest.mark.cpu_only

SHAPES = [
    Shape(4, 8, 3, 6, 33, "bfloat16", alignment=4, capacity=24, unused_tokens=2),
    Shape(4, 8, 6, 5, 8, "float16", ranks_per_node=2),
    Shape(4, 8, 3, 6, 5, "float32", wire=11, overflow="error"),
    Shape(4, 8, 4, 6, 7, "bfloat16", alignment=2, wire=9, capacity=14, unused_tokens=2),
    Shape(4, 8, 3, 6, 8, "float16", wire=13, capacity=16, ranks_per_node=2),
    Shape(6, 12, 7, 3, 7, "float32", wire=8, overflow="error", ranks_per_node=3),
]


@pytest.fixture(scope="module")
def programs(request):
    on_cpu = Program(request.param)
    with portable():
        made = Program(request.param), on_cpu
    with made[0].group, made[1].group:
        yield made


@pytest.mark.parametrize("programs", SHAPES, ids=str, indirect=True)
@examples(30)
@given(data=st.data())
def test_bits(programs, data):
    portable_one, on_cpu = programs
    shape = on_cpu.shape
    case = data.draw(inputs(shape, on_cpu.num_rows))
    routing = shape.route(case.topk_idx)
    is_error = shape.overflow == "error" and routing.num_dropped.any()
    expected = on_cpu(case)
    for actual, same in zip(portable_one(case), expected, strict=True):
        assert_same_bits(comparable(actual), comparable(same))
        if not is_error:  # no NaN is near to a sum
            assert_rounded(shape, case, actual, routing)
    for program in programs:
        if is_error:
            with pytest.raises(smfree.SmfreeError, match=f"wire_capacity {shape.wire}; "):
                program.group.check()
        program.group.check()
        assert program.group.stats()["rows_dropped"] == on_cpu.group.stats()["rows_dropped"]


def comparable(outputs):
    """Without what a portable group has no use for, ``handle.relay``."""
    handle = dataclasses.replace(outputs.d.handle, relay=None, group=None)
    d = outputs.d.replace(handle=handle)
    outputs = dataclasses.replace(outputs, d=d, weights_ct=None, topk_weights_ct=None)
    return jax.tree.map(with_one_nan, outputs)


def with_one_nan(values):
    values = np.asarray(values)
    if values.dtype.kind in "iu":
        return values
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(values), values.dtype.type("nan"), values)
