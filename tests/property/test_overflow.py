# SPDX-License-Identifier: Apache-2.0
"""``overflow="error"`` with random routings: NaN where rows did not fit, exact rows elsewhere."""

import jax
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
import oracle
from property.round_trip import Shape
from property.strategies import examples, routings
from support import ep_mesh

SHAPES = [
    Shape(2, 4, 2, 8, 4, "float32", capacity=14, overflow="error"),
    Shape(4, 8, 3, 6, 4, "bfloat16", capacity=20, overflow="error", alignment=2),
    Shape(8, 8, 1, 4, 4, "float16", capacity=5, overflow="error"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_overflow_poisons_the_rank_that_has_it(shape):
    mesh = ep_mesh(shape.ranks)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((shape.ranks, shape.tokens, shape.hidden)).astype(shape.dtype)
    topk_weights = rng.random((*x.shape[:2], shape.top_k)).astype(np.float32)

    with smfree.EpGroup.create(mesh, config=shape.config()) as group:

        @jax.jit
        def step(*arrays):
            def local(*arrays):
                d, _ = smfree.dispatch(group.token(), *(a[0] for a in arrays))
                return jax.tree.map(lambda a: a[None], d)

            return jax.shard_map(local, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))(*arrays)

        @examples(40)
        @given(topk_idx=routings(shape))
        def check(topk_idx):
            d = jax.tree.map(np.asarray, step(x, topk_idx, topk_weights))
            routing = oracle.route(
                topk_idx, shape.experts, recv_capacity=shape.capacity, alignment=shape.alignment
            )
            overflowed = routing.num_dropped > 0
            np.testing.assert_array_equal(d.num_dropped[:, 0], routing.num_dropped)
            rows, weights = oracle.dispatch(routing, x, topk_weights)
            rows[overflowed], weights[overflowed] = np.nan, np.nan
            np.testing.assert_array_equal(d.x.astype(np.float64), rows)
            np.testing.assert_array_equal(d.weights.astype(np.float64), weights)
            if overflowed.any():
                with pytest.raises(smfree.SmfreeError, match="recv_capacity"):
                    group.check()
            group.check()

        check()
