# SPDX-License-Identifier: Apache-2.0
"""Overflow with random routings: NaN where rows did not fit, exact rows elsewhere; gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
import oracle
from jax_smfree._src import reference
from property.round_trip import Shape
from property.strategies import examples, routings
from support import (
    assert_trees_close,
    block,
    ep_mesh,
    make_problem,
    portable_too,
    reference_of,
)

SHAPES = [
    Shape(2, 4, 2, 8, 4, "float32", capacity=14, overflow="error"),
    Shape(4, 8, 3, 6, 4, "bfloat16", capacity=20, overflow="error", alignment=2),
    Shape(8, 8, 1, 4, 4, "float16", capacity=5, overflow="error"),
    Shape(4, 8, 3, 6, 4, "float32", wire=16, overflow="error"),
    pytest.param(
        Shape(4, 8, 3, 6, 4, "float32", wire=16, overflow="error", ranks_per_node=2),
        marks=pytest.mark.cpu_only,
    ),
    pytest.param(
        Shape(8, 8, 3, 4, 4, "float32", wire=12, overflow="error", ranks_per_node=4),
        marks=pytest.mark.cpu_only,
    ),
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
            routing = shape.route(topk_idx)
            overflowed = routing.num_dropped > 0
            np.testing.assert_array_equal(d.num_dropped[:, 0], routing.num_dropped)
            rows, weights = oracle.dispatch(routing, x, topk_weights)
            rows[overflowed], weights[overflowed] = np.nan, np.nan
            np.testing.assert_array_equal(d.x.astype(np.float64), rows)
            np.testing.assert_array_equal(d.weights.astype(np.float64), weights)
            if overflowed.any():
                capacity = f"wire_capacity {shape.wire}; " if shape.wire else "recv_capacity"
                with pytest.raises(smfree.SmfreeError, match=capacity):
                    group.check()
            group.check()

        check()


@portable_too
@pytest.mark.parametrize(
    "capacities", [{"wire_capacity": 9}, {"wire_capacity": 9, "recv_capacity": 10}], ids=str
)
@pytest.mark.parametrize(
    "ranks_per_node", [None, pytest.param(2, marks=pytest.mark.cpu_only)], ids=str
)
def test_gradients_of_what_is_kept(groups, capacities, ranks_per_node):
    """A block whose rows do not all fit: outputs and gradients are those of the reference."""
    mesh = ep_mesh(4)
    problem = make_problem(mesh, none_fraction=0.0)
    group = groups(
        mesh, num_experts=8, top_k=2, hidden=16, max_tokens=6, dtype="float32", overflow="drop",
        ranks_per_node=ranks_per_node, **capacities,
    )  # fmt: skip

    def gradients(ops, token):
        def local(x, idx, weights, kernel):
            return block(ops, token(), x, idx, weights, kernel)[1]

        smap = jax.shard_map(
            local, mesh=mesh, in_specs=problem.specs, out_specs=P("ep"), check_vma=False
        )

        def loss(x, weights, kernel):
            out = smap(x, problem.topk_idx, weights, kernel)
            return jnp.sum(jnp.sin(out)), out

        grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(grad)(problem.x, problem.topk_weights, problem.kernel)

    actual = jax.block_until_ready(gradients(smfree, group.token))
    assert group.stats()["rows_dropped"] > 0
    assert_trees_close(actual, gradients(reference, reference_of(group).token))
