# SPDX-License-Identifier: Apache-2.0
"""Where parameters are, however they are made; and layers on meshes with explicit axes."""

import copy
import functools
import pickle

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import nn
from jax_smfree.nn import equinox as smfree_equinox
from jax_smfree.nn import nnx as smfree_nnx
from jax_smfree.nn.on_mesh import _init_on_mesh
from nn.functional import EXPERTS, HIDDEN, config, functional, rows_on
from support import as_many, assert_trees_close, devices

LAYERS, WIDTH = 3, 16
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = {
    "auto": (AUTO, AUTO),
    "explicit": (EXPLICIT, EXPLICIT),
    "explicit data": (EXPLICIT, AUTO),
    "explicit ep": (AUTO, EXPLICIT),
}


def mesh_of_kind(kind):
    number = as_many(8)
    grid = devices(number).reshape(2 if number >= 4 else 1, -1)
    return Mesh(grid, ("data", "ep"), axis_types=KINDS[kind])


def plain(group, key):
    return nn.init_moe_on_mesh(key, group, expert_width=WIDTH, shared_width=WIDTH)


def in_nnx(group, key):
    return smfree_nnx.MoeLayer(
        group, expert_width=WIDTH, shared_width=WIDTH, balanced=True, rngs=nnx.Rngs(key)
    )


def in_equinox(group, key):
    return smfree_equinox.MoeLayer(
        group, expert_width=WIDTH, shared_width=WIDTH, balanced=True, key=key
    )


def no_transform(make):
    return make


MADE = {
    "function": (plain, no_transform, jax.jit, jax.vmap),
    "nnx": (in_nnx, no_transform, nnx.jit, nnx.vmap),
    "equinox": (in_equinox, no_transform, equinox.filter_jit, equinox.filter_vmap),
}


def arrays_of(made):
    """The gate of the experts, the router, and the bias if there is one."""
    if isinstance(made, smfree_nnx.MoeLayer):
        return made.experts.gate[...], made.router[...], made.balance_bias[...]
    if isinstance(made, smfree_equinox.MoeLayer):
        return made.params.experts.gate, made.params.router, made.balance_bias
    return made.experts.gate, made.router, None


@pytest.mark.parametrize(
    ("how", "kind", "in_context"),
    [
        *(("function", kind, "ep" in kind or kind == "explicit") for kind in KINDS),
        *(
            (how, kind, kind != "auto")
            for how in ("nnx", "equinox")
            for kind in ("auto", "explicit")
        ),
    ],
)
def test_experts_are_where_their_rank_is(groups, how, kind, in_context):
    """Alone, under jit, under vmap, and under both."""
    mesh = mesh_of_kind(kind)
    group = groups(mesh, **config())
    make, nothing, jit, vmap = MADE[how]
    make = functools.partial(make, group)
    key, keys = jax.random.key(0), jax.random.split(jax.random.key(0), LAYERS)
    shard = (EXPERTS // group.num_ranks, HIDDEN, WIDTH)
    with jax.set_mesh(mesh) if in_context else jax.disable_jit(False):
        expected = arrays_of(make(key))[0]
        for wrap in (nothing, jit):
            gate, router, bias = arrays_of(wrap(make)(key))
            assert {s.data.shape for s in gate.addressable_shards} == {shard}
            assert router.sharding.is_fully_replicated
            assert bias is None or bias.sharding.is_fully_replicated
            np.testing.assert_allclose(gate, expected, rtol=1e-6)
        for wrap in (nothing, jit):
            gate, router, _ = arrays_of(wrap(vmap(make))(keys))
            assert {s.data.shape for s in gate.addressable_shards} == {(LAYERS, *shard)}
            assert router.sharding.is_fully_replicated
            assert router.shape == (LAYERS, HIDDEN, EXPERTS)


def test_no_device_makes_the_experts_of_others(groups):
    """The program that makes a layer needs memory on a device for what the device holds."""
    group = groups(mesh_of_kind("auto"), **config())
    sizes = {"hidden": 128, "num_experts": EXPERTS, "expert_width": 512, "dtype": jnp.float32}
    key = jax.random.key(0)
    memory = (
        _init_on_mesh(group.mesh, "ep", None, None, **sizes).lower(key).compile().memory_analysis()
    )
    experts = 3 * EXPERTS * 128 * 512 * 4
    needed = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert needed < 3 * experts / group.num_ranks


@pytest.mark.parametrize(
    ("kind", "in_context"),
    [("auto", True), ("explicit", False), ("explicit data", True), ("explicit ep", False)],
)
def test_layers_on_explicit_axes(groups, kind, in_context):
    """Rows of any sharding come out as they came in, with the same values and gradients."""
    mesh = mesh_of_kind(kind)
    group, reference_group = groups(mesh, **config()), groups(mesh_of_kind("auto"), **config())
    auto = rows_on(reference_group)
    params, bias = plain(group, jax.random.key(0)), nn.init_balance_bias_on_mesh(group)
    expected_params = plain(reference_group, jax.random.key(0))
    expected = functional(reference_group, expected_params, auto)

    def loss(params, x):
        out, _ = nn.moe_layer_on_mesh(group, params, x, balance_bias=bias)
        return jnp.sum((x + out) ** 2), out

    def reference_loss(params, x):
        return jnp.sum((x + functional(reference_group, params, x)) ** 2)

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    expected_of = jax.jit(jax.grad(reference_loss, argnums=(0, 1)))(expected_params, auto)
    for spec in (P(mesh.axis_names), P(), P(None, "ep")):
        x = jax.device_put(np.asarray(auto), NamedSharding(mesh, spec))
        with jax.set_mesh(mesh) if in_context else jax.disable_jit(False):
            (_, out), (of_params, of_x) = gradients(params, x)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        assert_trees_close((of_params, of_x), expected_of)
        assert jax.typeof(of_x) == jax.typeof(x) == jax.typeof(out)
        assert jax.typeof(of_params.experts.gate) == jax.typeof(params.experts.gate)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_token_is_made_on_explicit_axes(groups, kind):
    mesh = mesh_of_kind(kind)
    group = groups(mesh, **config())
    spec = group.token_spec

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec))
    def there_and_back(token, x):
        choices = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None] + jnp.arange(2)
        d, token = smfree.dispatch(token, x, choices % EXPERTS)
        out, token = smfree.combine(token, d, d.x)
        return token, out

    x = rows_on(group)
    with jax.set_mesh(mesh):
        token, out = jax.jit(lambda x: there_and_back(group.token(), x))(x)
        _, again = there_and_back(token, out)
    np.testing.assert_array_equal(out, 2 * x)
    np.testing.assert_array_equal(again, 4 * x)


@pytest.mark.parametrize("how", ["nnx", "equinox"])
def test_a_copy_has_the_same_group(groups, how):
    group = groups(mesh_of_kind("auto"), **config())
    make, _, jit, _ = MADE[how]
    layer, x = make(group, jax.random.key(0)), rows_on(group)
    expected = jit(lambda layer, x: layer(x))(layer, x)[0]
    for duplicate in (copy.copy(layer), copy.deepcopy(layer)):
        assert duplicate.group is group
        np.testing.assert_array_equal(jit(lambda layer, x: layer(x))(duplicate, x)[0], expected)
    with pytest.raises(TypeError, match=r"a group to pickle.*Save the arrays"):
        pickle.dumps(layer)


def test_layers_made_by_vmap_are_scanned(groups):
    """A stack of layers, as models with many have them."""
    group = groups(mesh_of_kind("auto"), **config())
    keys, x = jax.random.split(jax.random.key(0), LAYERS), rows_on(group)
    stack = nnx.vmap(functools.partial(in_nnx, group))(keys)

    @nnx.jit
    def run(stack, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def step(x, layer):
            return x + layer(x)[0]

        return step(x, stack)

    expected = x
    for key in keys:
        expected = expected + functional(group, plain(group, key_of(key)), expected)
    np.testing.assert_allclose(run(stack, x), expected, rtol=1e-4, atol=1e-5)


def key_of(key):
    """What ``nnx.Rngs(key)`` gives as its first key of parameters."""
    return nnx.Rngs(key).params()


def test_tabulate(groups):
    group = groups(mesh_of_kind("auto"), **config())
    layer, x = in_nnx(group, jax.random.key(0)), rows_on(group)
    table = nnx.tabulate(layer, x, console_kwargs={"width": 200, "force_terminal": False})
    assert "MoeLayer" in table and "Parameters" in table
    assert f"float32[{len(x)},{HIDDEN}]" in table  # the rows
    assert f"int32[{EXPERTS}]" in table  # aux.load
