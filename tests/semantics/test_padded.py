# SPDX-License-Identifier: Apache-2.0
"""The padded layout: what is where, what JAX's transformations make of it, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree._src import reference
from support import (
    assert_trees_close,
    ep_mesh,
    in_both_modes,
    make_problem,
    portable_too,
    reference_of,
)

SIZES = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 6, "dtype": jnp.float32}
PADDED = {**SIZES, "layout": "padded"}


def on_ranks(group, f):
    return jax.jit(jax.shard_map(f, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep")))


@portable_too
def test_by_hand(groups):
    """Row t of rank r is 10 r + t. Expert 1 gets all of rank 0, and expert 0 the last rows."""
    group = groups(ep_mesh(2), **{**PADDED, "num_experts": 4, "top_k": 2, "max_tokens": 2})
    x = jnp.array([[0.0], [1], [10], [11]])
    idx = jnp.array([[1, -1], [0, 1], [2, -1], [0, -1]], jnp.int32)

    @functools.partial(on_ranks, group)
    def step(x, idx):
        d, token = smfree.dispatch(group.token(), x, idx, jnp.ones((2, 2)).at[1, 1].set(3))
        out, _ = smfree.combine(token, d, d.x * (1 + d.local_expert[..., None]))
        return d, d.local_expert, out

    d, local_expert, out = step(x, idx)
    assert d.x.shape == (4, 4, 1) and d.weights.shape == local_expert.shape == (4, 4)
    assert d.group_sizes.tolist() == d.num_rows.tolist() == [2, 2, 1, 0]
    assert local_expert.tolist() == [[0, 0, 2, 2], [1, 1, 2, 2], [0, 2, 2, 2], [2, 2, 2, 2]]
    assert d.x[0, :2, 0].tolist() == [1, 11]
    assert d.x[1, :2, 0].tolist() == [0, 1]
    assert d.x[2, :1, 0].tolist() == [10]
    assert d.weights[1, :2].tolist() == [1, 3]
    assert out[:, 0].tolist() == [0, 1 * 1 + 3 * 2, 10, 11]


def block(ops, token, x, idx, weights, kernel):
    """Experts that differ, and that look at nothing past the counts."""
    d, token = dispatched(ops, token, x, idx, weights)
    here = (d.local_expert < d.group_sizes.shape[0])[..., None]
    y = jnp.einsum("ech,hf->ecf", jnp.where(here, d.x, 0), kernel)
    y = jnp.where(here, jnp.tanh(y) * (1 + d.local_expert[..., None]), 0)
    token = ops.combine_send(token, d, y)
    out, token = ops.combine_recv(token, add=x)
    return token, out


def dispatched(ops, token, x, idx, weights, **how):
    return ops.dispatch_recv(ops.dispatch_send(token, x, idx, weights, **how))


@in_both_modes
@pytest.mark.parametrize("policy", [None, smfree.save_comm_policy], ids=["replay", "kept"])
def test_layers_in_a_scan_that_are_computed_again(groups, policy):
    """Outputs and gradients of two layers are those of the reference."""
    group = groups(ep_mesh(4), **PADDED, expert_alignment=4)
    problem = make_problem(group.mesh)

    def gradients(ops, group):
        def local(x, idx, weights, kernels):
            @functools.partial(jax.checkpoint, policy=policy)
            def layer(carry, kernel):
                token, x = block(ops, *carry[:2], idx, weights, kernel)
                return (token, x), None

            (_, x), _ = jax.lax.scan(layer, (group.token(), x), kernels)
            return x

        smap = jax.shard_map(local, mesh=problem.mesh, in_specs=problem.specs, out_specs=P("ep"))

        def loss(x, weights, kernels):
            out = smap(x, problem.topk_idx, weights, kernels)
            return jnp.sum(jnp.sin(out)), out

        kernels = jnp.stack([problem.kernel, -problem.kernel])
        grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(grad)(problem.x, problem.topk_weights, kernels)

    assert_trees_close(gradients(smfree, group), gradients(reference, reference_of(group)))


@portable_too
def test_forward_and_second_derivatives(groups):
    group = groups(ep_mesh(4), **PADDED)
    problem = make_problem(group.mesh)

    def derivatives(ops, group):
        def local(x, idx, weights, kernel):
            return block(ops, group.token(), x, idx, weights, kernel)[1]

        smap = jax.shard_map(local, mesh=problem.mesh, in_specs=problem.specs, out_specs=P("ep"))

        def loss(x, weights):
            return jnp.sum(jnp.sin(smap(x, problem.topk_idx, weights, problem.kernel)))

        operands = problem.x, problem.topk_weights
        dots = jax.tree.map(jnp.cos, operands)
        return jax.jit(lambda: jax.jvp(jax.grad(loss, argnums=(0, 1)), operands, dots))()

    assert_trees_close(derivatives(smfree, group), derivatives(reference, reference_of(group)))


@portable_too
def test_quantised_rows_that_are_kept(groups):
    """Values and scales have the two sizes as well, and the bits of the reference's."""
    group = groups(ep_mesh(4), **{**PADDED, "hidden": 64})
    problem = make_problem(group.mesh, hidden=64)

    def received(ops, group):
        def local(x, idx, weights):
            how = {"wire": smfree.Fp8(block=32), "keep": True}
            d, _ = dispatched(ops, group.token(), {"x": x}, idx, weights, **how)
            here = d.local_expert < 2
            return jax.tree.map(lambda v: jnp.where(here[..., None], v.astype(jnp.float32), 0), d.x)

        smap = jax.shard_map(local, mesh=group_mesh, in_specs=P("ep"), out_specs=P("ep"))
        return jax.jit(smap)(*problem.arrays[:3])

    group_mesh = group.mesh
    got, expected = received(smfree, group)["x"], received(reference, reference_of(group))["x"]
    assert got.values.shape == (8, 24, 64) and got.scales.shape == (8, 24, 2)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    ("of", "match"),
    [
        (
            lambda d: (d, d.x.reshape(48, 16)),
            r"got y\[48, 16\], expected \[E / R, C, \.\.\.\] = \[2, 24, \.\.\.\], as d\.x has",
        ),
        (
            lambda d: (d, d.x, d.weights.reshape(48)),
            r"got weights\[48\], expected \[E / R, C\] = \[2, 24\]",
        ),
        (
            lambda d: (d.replace(x=d.x[:, :5]), d.x),
            r"got a d with d\.x\[2, 5, 16\], expected the 2 x 24 rows",
        ),
    ],
    ids=("y", "weights", "d"),
)
def test_other_shapes_are_refused(groups, of, match):
    group = groups(ep_mesh(4), **PADDED)
    problem = make_problem(group.mesh)

    @functools.partial(on_ranks, group)
    def step(x, idx):
        d, token = smfree.dispatch(group.token(), x, idx)
        return smfree.combine(token, *of(d))[0]

    with pytest.raises(ValueError, match=match):
        step(problem.x, problem.topk_idx)
