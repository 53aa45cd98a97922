# SPDX-License-Identifier: Apache-2.0
"""What varies over which axes of the mesh (``check_vma``), and batches that are split over one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import nn
from jax_smfree._src import reference
from support import (
    as_many,
    assert_trees_close,
    block,
    devices,
    ep_mesh,
    in_both_modes,
    make_problem,
    reference_of,
)

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}
LAYERS = 2
WRAPS = {
    "plain": lambda layer: layer,
    "checkpoint": jax.checkpoint,
    "save_comm": functools.partial(jax.checkpoint, policy=smfree.save_comm_policy),
}


def mesh_with(other, *, first):
    """A mesh of ``"ep"`` and another axis, of 2 where there are devices enough."""
    number = as_many(8)
    others = 2 if number >= 4 else 1
    if first:
        return Mesh(devices(number).reshape(others, -1), (other, "ep"))
    return Mesh(devices(number).reshape(-1, others), ("ep", other))


def problem_along_ep(mesh):
    """Rows split over ``"ep"`` alone: what is on the mesh is smaller than the mesh."""
    problem = make_problem(ep_mesh(mesh.shape["ep"]))
    return [np.asarray(array) for array in problem.arrays]


def value_and_grads(ops, start, mesh, wrap, arrays):
    layer = wrap(functools.partial(block, ops))

    def local(x, *others):
        def step(carry, _):
            return layer(*carry, *others), None

        return jax.lax.scan(step, (start(), x), length=LAYERS)[0][1]

    rows = P("ep")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=rows)

    def loss(*arrays):
        return jnp.sum(sharded(*arrays) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3)))(*arrays)


@in_both_modes
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("first", [True, False])
def test_replicated_rows_stay_replicated(groups, first, wrap):
    """``P("ep")`` in and out on a mesh with a further axis, over which nothing varies."""
    mesh = mesh_with("model", first=first)
    group, arrays = groups(mesh, **CONFIG), problem_along_ep(mesh)
    actual = value_and_grads(smfree, group.token, mesh, WRAPS[wrap], arrays)
    expected = value_and_grads(reference, reference_of(group).token, mesh, WRAPS["plain"], arrays)
    assert_trees_close(actual, expected)


def test_what_comes_out_varies_over_the_axes_of_what_went_in(groups):
    mesh = mesh_with("model", first=False)
    group, arrays = groups(mesh, **CONFIG), problem_along_ep(mesh)
    seen = {}

    def local(x, idx, weights, slices):
        d, token = smfree.dispatch(group.token(), x, idx, weights)
        out, token = smfree.combine(token, d, d.x)
        seen["x"] = {jax.typeof(v).mat.varying for v in jax.tree.leaves((d, out))}
        wider, token = smfree.combine(token, d, d.x * slices[0, 0])
        seen["y"] = {jax.typeof(wider).mat.varying}
        seen["token"] = {jax.typeof(token.array).mat.varying}
        return out, jax.lax.psum(wider, "model")

    rows = P("ep")
    specs = (rows, rows, rows, P(None, "model"))
    step = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(rows, rows))
    out, summed = jax.jit(step)(*arrays)
    assert seen["x"] == {frozenset({"ep"})}
    assert seen["y"] == seen["token"] == {frozenset({"ep", "model"})}
    scale = arrays[3][0, :: arrays[3].shape[1] // mesh.shape["model"]].sum()
    np.testing.assert_allclose(summed, out * scale, rtol=1e-4, atol=1e-5)


@in_both_modes
@pytest.mark.parametrize(
    ("wrap", "check_vma"), [("plain", True), ("plain", False), ("checkpoint", False)]
)
def test_pipeline_stages(groups, wrap, check_vma):
    """``vmap(..., spmd_axis_name="stage")``: each stage has one entry of the batch.

    JAX cannot batch its own ``checkpoint`` and ``scan`` in this way under ``check_vma=True``.
    """
    mesh = mesh_with("stage", first=True)
    stages = mesh.shape["stage"]
    group, one = groups(mesh, **CONFIG), problem_along_ep(mesh)
    rng = np.random.default_rng(1)
    x, idx, weights = (np.stack([np.roll(v, s, 0) for s in range(stages)]) for v in one[:3])
    kernels = rng.standard_normal((stages, *one[3].shape)).astype(np.float32) / 4

    def losses(ops, start):
        layer = WRAPS[wrap if ops is smfree else "plain"](functools.partial(block, ops))
        rows = P("ep")

        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=rows,
            check_vma=check_vma,
        )  # fmt: skip
        def stage(*arrays):
            token, x = start(), arrays[0]
            for _ in range(LAYERS):
                token, x = layer(token, x, *arrays[1:])
            return x

        def loss(x, weights, kernels):
            batched = jax.vmap(stage, spmd_axis_name="stage") if ops is smfree else each(stage)
            return jnp.sum(batched(x, idx, weights, kernels) ** 2)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, weights, kernels)

    def each(stage):
        return lambda *arrays: jnp.stack([stage(*entry) for entry in zip(*arrays, strict=True)])

    assert_trees_close(losses(smfree, group.token), losses(reference, reference_of(group).token))


def test_gradients_per_stage(groups):
    """``vmap(grad(...))``: the operations of the backward pass are batched too."""
    mesh = mesh_with("stage", first=True)
    stages = mesh.shape["stage"]
    group, (x, idx, weights, kernel) = groups(mesh, **CONFIG), problem_along_ep(mesh)
    rows = P("ep")

    def loss(ops, start, x, scale):
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=rows
        )
        def stage(*arrays):
            return block(ops, start(), *arrays)[1]

        return jnp.sum(stage(x, idx, weights * scale, kernel) ** 2)

    def grad(ops, start):
        return jax.value_and_grad(functools.partial(loss, ops, start), argnums=(0, 1))

    xs, scales = np.stack([x * (s + 1) for s in range(stages)]), np.arange(1.0, stages + 1)
    batched = jax.vmap(grad(smfree, group.token), spmd_axis_name="stage")
    alone = jax.jit(grad(reference, reference_of(group).token))
    expected = [alone(x, scale) for x, scale in zip(xs, scales, strict=True)]
    actual = jax.jit(batched)(xs, scales)
    assert_trees_close(actual, jax.tree.map(lambda *v: np.stack(v), *expected))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("other", ["model", "stage"])
def test_moe_layer_beside_another_axis(groups, other, check_vma):
    """The layer of `nn`, replicated over ``"model"``; and several, one per ``"stage"``."""
    mesh = mesh_with(other, first=other == "stage")
    group, (x, *_) = groups(mesh, **CONFIG), problem_along_ep(mesh)
    keys = jax.random.split(jax.random.key(0), mesh.shape[other])
    sizes = {"hidden": 16, "num_experts": 8, "expert_width": 8, "shared_width": 8}
    params = [nn.init_moe(key, **sizes) for key in keys]

    def layer(implementation, params, x):
        def local(params, x):
            token = group.token()
            return nn.moe_layer(token, params, x, implementation=implementation)[1]

        specs, rows = nn.moe_specs(params, "ep"), P("ep")
        return jax.shard_map(
            local, mesh=mesh, in_specs=(specs, rows), out_specs=rows, check_vma=check_vma
        )(params, x)

    def loss(params, x):
        one = functools.partial(layer, "smfree")
        run = one if other == "model" else jax.vmap(one, in_axes=(0, None), spmd_axis_name="stage")
        return jnp.sum(run(params, x) ** 2)

    def reference_loss(params, x):
        return jnp.sum(layer("reference", params, x) ** 2)

    grad = functools.partial(jax.value_and_grad, argnums=(0, 1))
    expected = [jax.jit(grad(reference_loss))(each, x) for each in params]
    if other == "model":
        assert_trees_close(jax.jit(grad(loss))(params[0], x), expected[0])
    else:
        stack = jax.tree.map(lambda *v: jnp.stack(v), *params)
        value, (of_params, of_x) = jax.jit(grad(loss))(stack, x)
        values, of_each = zip(*expected, strict=True)
        assert_trees_close((value, of_x), (sum(values), sum(of for _, of in of_each)))
        assert_trees_close(
            of_params, jax.tree.map(lambda *v: np.stack(v), *(p for p, _ in of_each))
        )


@pytest.mark.parametrize("derivative", [False, True])
def test_other_batches_are_refused(groups, derivative):
    mesh = mesh_with("stage", first=True)
    group, (x, idx, weights, kernel) = groups(mesh, **CONFIG), problem_along_ep(mesh)
    rows = P("ep")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=rows)
    def layer(*arrays):
        return block(smfree, group.token(), *arrays)[1]

    def loss(x):
        return jnp.sum(layer(x, idx, weights, kernel) ** 2)

    per_rank = 3 * mesh.shape["stage"]
    batched = jax.vmap(jax.grad(loss) if derivative else loss, spmd_axis_name="stage")
    with pytest.raises(
        NotImplementedError, match=r"in block is vmapped .* 3 entries per rank.*scan"
    ):
        jax.jit(batched).lower(np.stack([x] * per_rank))
