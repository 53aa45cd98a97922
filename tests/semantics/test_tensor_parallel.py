# SPDX-License-Identifier: Apache-2.0
"""Experts that are split over a further axis: each rank combines its slice of the results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree._src import reference
from support import as_many, assert_trees_close, devices, make_problem, portable_too, reference_of

HIDDEN, WIDTH = 16, 24
CONFIG = {"num_experts": 8, "top_k": 2, "hidden": HIDDEN, "max_tokens": 6, "dtype": jnp.float32}


def moe(ops, start, x, idx, weights, up, down, shared):
    """Rows are the same along "tp", and so is what comes out; ``up`` and ``down`` are split."""
    token = ops.dispatch_send(start(), x, idx, weights)
    d, token = ops.dispatch_recv(token)
    partial = jnp.tanh(d.x @ up) @ down * (1 + d.local_expert)[:, None]
    y = jax.lax.psum_scatter(partial, "tp", scatter_dimension=1, tiled=True)  # [N, H / TP]
    token = ops.combine_send(token, d, y)
    out, _ = ops.combine_recv(token, add=x[:, : y.shape[1]] @ shared)
    return out  # [T, H / TP]


@portable_too
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients(groups, check_vma):
    """Also of rows that are the same along the axis, while what is combined differs there."""
    number = as_many(8, at_least=2)
    mesh = Mesh(devices(number).reshape(-1, 2), ("ep", "tp"))
    group = groups(mesh, **CONFIG)
    flat = make_problem(Mesh(devices(mesh.shape["ep"]), ("ep",)), hidden=HIDDEN)
    x, idx, weights, _ = map(np.asarray, flat.arrays)
    rng = np.random.default_rng(1)
    up, down, shared = (
        rng.standard_normal(shape).astype(np.float32) / 4
        for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN), (HIDDEN // 2, HIDDEN // 2))
    )
    rows = P("ep")
    specs = (rows, rows, rows, P(None, "tp"), P("tp", None), P())

    def value_and_grads(ops, start):
        smap = jax.shard_map(
            lambda *arrays: moe(ops, start, *arrays), mesh=mesh, in_specs=specs,
            out_specs=P("ep", "tp"), check_vma=check_vma,
        )  # fmt: skip

        def loss(x, weights, up, down, shared):
            return jnp.sum(jnp.sin(smap(x, idx, weights, up, down, shared)))

        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))
        return jax.jit(gradient)(x, weights, up, down, shared)

    actual = value_and_grads(smfree, group.token)
    assert_trees_close(actual, value_and_grads(reference, reference_of(group).token))


@portable_too
def test_an_addend_that_differs_along_the_axis(groups):
    """The results of the experts do not, so their gradients are summed over it."""
    number = as_many(8, at_least=2)
    mesh = Mesh(devices(number).reshape(-1, 2), ("ep", "tp"))
    group = groups(mesh, **CONFIG)
    flat = make_problem(Mesh(devices(mesh.shape["ep"]), ("ep",)), hidden=HIDDEN)
    x, idx, weights, _ = map(np.asarray, flat.arrays)
    add = np.random.default_rng(1).standard_normal((len(x), 2 * HIDDEN)).astype(np.float32)

    def value_and_grads(ops, start):
        def local(x, weights, add, idx):
            token = ops.dispatch_send(start(), x, idx, weights)
            d, token = ops.dispatch_recv(token)
            out, _ = ops.combine_recv(ops.combine_send(token, d, jnp.tanh(d.x)), add=add)
            return out

        rows = P("ep")
        smap = jax.shard_map(
            local, mesh=mesh, in_specs=(rows, rows, P("ep", "tp"), rows),
            out_specs=P("ep", "tp"),
        )  # fmt: skip

        def loss(x, weights, add):
            return jnp.sum(jnp.sin(smap(x, weights, add, idx)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, weights, add)

    actual = value_and_grads(smfree, group.token)
    assert_trees_close(actual, value_and_grads(reference, reference_of(group).token))


def test_a_capacity_that_differs_along_the_axis(groups):
    mesh = Mesh(devices(as_many(8, at_least=2)).reshape(-1, 2), ("ep", "tp"))
    group = groups(mesh, **CONFIG)

    def local(x):
        idx = jnp.zeros((x.shape[0], 2), jnp.int32).at[:, 1].set(1)
        token = smfree.dispatch_send(group.token(), x, idx)
        return smfree.dispatch_recv(token, capacity=jax.lax.axis_index("tp"))[0].x

    smap = jax.shard_map(local, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    with pytest.raises(ValueError, match=r"capacity that varies over the mesh axes \['tp'\]"):
        jax.eval_shape(smap, jnp.ones((2 * mesh.shape["ep"], HIDDEN)))
