# SPDX-License-Identifier: Apache-2.0
"""`jax_smfree.nn.equinox` against the functional layer."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_smfree import nn
from jax_smfree.nn import equinox as smfree_equinox
from nn.functional import EXPERTS, config, functional, loss, rows_on
from nn.models import MODELS
from support import as_many, ep_mesh, mesh_of


def layer_on(group, **options):
    key = jax.random.key(0)
    return smfree_equinox.MoeLayer(
        group, expert_width=16, key=key, **({"shared_width": 16} | options)
    )


@pytest.mark.parametrize(("mesh", "shared_width"), [("ep", 0), ("data,ep", 16)])
def test_the_module_computes_what_the_function_does(groups, mesh, shared_width):
    group = groups(mesh_of(mesh), **config())
    layer, x = layer_on(group, shared_width=shared_width), rows_on(group)
    out, aux = equinox.filter_jit(layer)(x)
    np.testing.assert_allclose(out, functional(group, layer.params, x), rtol=1e-5, atol=1e-6)
    assert int(aux.load.sum()) == 2 * len(x)
    assert int(aux.num_dropped) == 0


def test_a_layer_with_other_experts(groups):
    """The arguments of the function are those of the module, and so are its parameters."""
    group = groups(mesh_of("data,ep"), **config())
    model = MODELS["nemotron_h"]
    options = {"router": model.router, "biases": True, "gated": False} | model.options
    layer, x = layer_on(group, fsdp_axis="data", **options), rows_on(group)[:6].reshape(2, 3, -1)
    given = {"router": model.router} | model.options
    out, _ = equinox.filter_jit(layer)(x)
    expected, _ = jax.jit(lambda p, x: nn.moe_layer_on_mesh(group, p, x, **given))(layer.params, x)
    np.testing.assert_array_equal(out, expected)
    assert layer.params.experts.up.sharding.spec == P("ep", "data")


def test_gradients_reach_all_parameters_but_the_bias(groups):
    group = groups(ep_mesh(as_many(4)), **config())
    layer, x = layer_on(group, balanced=True), rows_on(group)

    grad = equinox.filter_jit(equinox.filter_value_and_grad(loss))
    first, gradients = grad(layer, x)
    assert len(jax.tree.leaves(gradients.params)) == 7
    for gradient in jax.tree.leaves(gradients.params):
        assert float(jnp.abs(gradient).max()) > 0
    np.testing.assert_array_equal(gradients.balance_bias, np.zeros(EXPERTS))
    stepped = equinox.apply_updates(layer, jax.tree.map(lambda g: -0.5 * g, gradients))
    assert grad(stepped, x)[0] < first


def test_the_bias_follows_the_load(groups):
    group = groups(ep_mesh(as_many(4)), **config())
    layer, x = layer_on(group, balanced=True), rows_on(group)

    @equinox.filter_jit
    def step(layer, x):
        _, aux = layer(x)
        return layer.update_balance(aux, rate=0.5), aux.load

    updated, load = step(layer, x)
    expected = 0.5 * np.sign(np.mean(load) - np.asarray(load))
    np.testing.assert_array_equal(updated.balance_bias, expected)
    np.testing.assert_array_equal(layer.balance_bias, np.zeros(EXPERTS))
    with pytest.raises(ValueError, match="made with balanced=True"):
        layer_on(group).update_balance(None)
