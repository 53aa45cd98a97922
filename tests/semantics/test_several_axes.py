# SPDX-License-Identifier: Apache-2.0
"""Groups over several mesh axes: ranks are numbered row-major over them, in the order given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import nn
from jax_smfree._src import reference
from nn.functional import config, functional, rows_on
from support import (
    assert_trees_close,
    devices,
    make_problem,
    reference_of,
)

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}

# The axes of the mesh, each of size 2, and those of the group.
AXES = [
    (("a", "b"), ("a", "b")),
    (("a", "b"), ("b", "a")),
    (("dp", "a", "b"), ("a", "b")),
    (("a", "dp", "b"), ("b", "a")),
    (("a", "b", "dp"), ("b", "a")),
]


def name(axes):
    return "".join(axes).replace("dp", "_")


def mesh_with(axes, **options):
    return Mesh(devices(2 ** len(axes)).reshape([2] * len(axes)), axes, **options)


@pytest.mark.parametrize(("mesh_axes", "axis"), AXES, ids=name)
def test_who_is_which_rank(groups, mesh_axes, axis):
    """By the devices that the rows of an expert come to: rank r has experts 2 r and 2 r + 1."""
    mesh = mesh_with(mesh_axes)
    group = groups(mesh, axis, **CONFIG | {"top_k": 1, "max_tokens": 28})
    assert (group.axis, group.num_ranks) == (axis, 4)
    counts = np.arange(8)  # rows of each expert, from each rank

    def local():
        x, topk_idx = jnp.ones((28, 16)), jnp.repeat(jnp.arange(8, dtype=jnp.int32), counts)
        d, _ = smfree.dispatch(group.token(), x, topk_idx[:, None])
        return d.group_sizes

    sizes = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=group.token_spec))()
    for shard in sizes.addressable_shards:
        (at,) = np.argwhere(mesh.devices == shard.device)
        of_axis = dict(zip(mesh_axes, at, strict=True))
        rank = 2 * of_axis[axis[0]] + of_axis[axis[1]]
        np.testing.assert_array_equal(shard.data, 4 * counts[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize(
    ("mesh_axes", "axis", "nodes"),
    [
        *((*axes, {}) for axes in AXES),
        *((*axes, {"ranks_per_node": 2}) for axes in (AXES[1], AXES[3])),
    ],
    ids=lambda value: name(value) if isinstance(value, tuple) else f"nodes={len(value)}",
)
def test_values_and_gradients(groups, mesh_axes, axis, nodes):
    """Each rank multiplies by a number of its own."""
    mesh = mesh_with(mesh_axes)
    group, problem = groups(mesh, axis, **CONFIG, **nodes), make_problem(mesh)
    assert group.config.mode == ("hierarchical" if nodes else "direct")

    def value_and_grads(ops, start):
        def local(x, topk_idx, topk_weights):
            d, token = ops.dispatch_recv(ops.dispatch_send(start(), x, topk_idx, topk_weights))
            y = jnp.sin(d.x) * (1 + jax.lax.axis_index(axis))
            out, _ = ops.combine_recv(ops.combine_send(token, d, y))
            return jnp.sum(out**2)[None]

        rows = problem.rows
        each = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows)
        loss = jax.value_and_grad(lambda *arrays: jnp.sum(each(*arrays)), argnums=(0, 2))
        return jax.jit(loss)(*problem.arrays[:3])

    expected = value_and_grads(reference, reference_of(group).token)
    assert_trees_close(value_and_grads(smfree, group.token), expected)


def test_what_does_not_vary_over_a_further_axis(groups):
    """Rows that are split over the group's axes alone are of one value along the others."""
    mesh = mesh_with(("a", "dp", "b"))
    group = groups(mesh, ("b", "a"), **CONFIG)
    problem = make_problem(mesh_with(("b", "a")))
    rows = P(group.axis)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows)
    def there_and_back(x, topk_idx, topk_weights):
        d, token = smfree.dispatch(group.token(), x, topk_idx, topk_weights)
        return smfree.combine(token, d, d.x)[0]

    x, topk_idx, topk_weights = map(np.asarray, problem.arrays[:3])
    out = jax.jit(there_and_back)(x, topk_idx, topk_weights)
    weights = np.where(topk_idx < 0, 0, topk_weights).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out, x * weights, rtol=1e-5, atol=1e-5)


def test_a_layer_on_global_arrays(groups):
    """On explicit axes, where types say what is split over which; against plain jax.numpy."""
    axes, axis = ("a", "dp", "b"), ("b", "a")
    group = groups(mesh_with(axes, axis_types=(AxisType.Explicit,) * 3), axis, **config())
    params = nn.init_moe_on_mesh(jax.random.key(0), group, expert_width=16)
    assert params.experts.gate.sharding.spec == P(axis)

    def value_and_grads(layer):
        loss = jax.value_and_grad(lambda params, x: jnp.sum((x + layer(params, x)) ** 2), (0, 1))
        return jax.jit(loss)(params, rows_on(group))

    actual = value_and_grads(lambda *arrays: nn.moe_layer_on_mesh(group, *arrays)[0])
    assert_trees_close(actual, value_and_grads(lambda *arrays: functional(group, *arrays)))
