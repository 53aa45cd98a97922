# SPDX-License-Identifier: Apache-2.0
"""Operations too large for the caches, which backends may write in another way.

Columns do not know of each other. So a few columns of a large operation must have the same bits as
an operation on these columns alone, which test_round_trip.py compares with the oracle.
"""

import dataclasses

import jax
import numpy as np
import pytest

from property.expectations import assert_same_bits, assert_within
from property.round_trip import Program, Shape
from property.strategies import random_inputs
from support import random_routing

WIDTH = 64
# More than 8 MiB for all ranks; rows that do not end where a cache line does.
SHAPES = [
    Shape(2, 4, 2, 70, 16503, "float32"),
    Shape(2, 4, 2, 140, 16503, "bfloat16", capacity=300),
    Shape(2, 4, 2, 140, 16503, "float16", alignment=4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns(shape):
    rng = np.random.default_rng(0)
    narrow = Program(dataclasses.replace(shape, hidden=WIDTH))
    wide = Program(shape)
    idx = random_routing(rng, shape.ranks * shape.tokens, shape.top_k, shape.experts)
    idx[rng.random(idx.shape) < 0.1] = -1
    idx = idx.reshape(shape.ranks, shape.tokens, shape.top_k)
    repeated = random_inputs(rng, dataclasses.replace(shape, hidden=1009), wide.num_rows, idx)
    repeats = -(-shape.hidden // 1009)

    def widen(array):
        """A wide row repeats a random one of a prime length."""
        if array.shape[-1] != 1009:
            return array
        return np.tile(array, repeats)[..., : shape.hidden]

    def columns(start):
        def of(array):
            return array[..., start : start + WIDTH] if array.shape[-1] == shape.hidden else array

        return of

    case = map_arrays(widen, repeated)
    with wide.group, narrow.group:
        native, hooks = wide(case)
        assert_same_bits(hooks, native)
        for start in (0, 8191, shape.hidden - WIDTH):
            expected, _ = narrow(map_arrays(columns(start), case))
            actual = jax.tree.map(columns(start), native)
            # Sums over columns: see below.
            actual, expected = (
                dataclasses.replace(o, weights_ct=None, topk_weights_ct=None)
                for o in (actual, expected)
            )
            assert_same_bits(actual, expected)
    assert_weights_ct(shape, case, native.weights_ct)


def assert_weights_ct(shape, case, weights_ct):
    """Products of rows, within the roundings of a sum of so many float32 products."""
    routing = shape.route(case.topk_idx)
    expected, magnitude = np.zeros(weights_ct.shape), np.zeros(weights_ct.shape)
    for receiver, source, position, _, row in routing.copies:
        y = case.ys[1][receiver, row].astype(np.float64)
        products = y * case.out_cts[1][source, position].astype(np.float64)
        expected[receiver, row] = products.sum()
        magnitude[receiver, row] = np.abs(products).sum()
    half_ulp = np.finfo(np.float32).eps / 2
    assert_within(weights_ct, expected, shape.hidden * half_ulp * magnitude, "gradient of weights")


def map_arrays(function, inputs):
    fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    return type(inputs)(**jax.tree.map(function, fields))
