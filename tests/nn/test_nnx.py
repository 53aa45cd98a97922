# SPDX-License-Identifier: Apache-2.0
"""`jax_smfree.nn.nnx` against the functional layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_smfree import nn
from jax_smfree.nn import nnx as smfree_nnx
from nn.functional import EXPERTS, HIDDEN, config, functional, loss, rows_on
from nn.models import MODELS
from support import as_many, ep_mesh, mesh_of


def layer_on(group, **options):
    return smfree_nnx.MoeLayer(
        group, expert_width=16, rngs=nnx.Rngs(0), **({"shared_width": 16} | options)
    )


@pytest.mark.parametrize(("mesh", "shared_width"), [("ep", 0), ("data,ep", 16)])
def test_the_module_computes_what_the_function_does(groups, mesh, shared_width):
    group = groups(mesh_of(mesh), **config())
    layer, x = layer_on(group, shared_width=shared_width), rows_on(group)
    out, aux = nnx.jit(lambda layer, x: layer(x))(layer, x)
    np.testing.assert_allclose(out, functional(group, layer.params(), x), rtol=1e-5, atol=1e-6)
    assert int(aux.load.sum()) == 2 * len(x)
    assert int(aux.num_dropped) == 0
    assert float(aux.load_balancing_loss) >= 0.5


def test_a_layer_with_other_experts(groups):
    """The arguments of the function are those of the module, and so are its parameters."""
    group = groups(ep_mesh(as_many(4)), **config())
    model = MODELS["gpt_oss"]
    options = {"router": model.router, "biases": True, "balanced": True} | model.options
    layer = layer_on(group, param_dtype=jnp.bfloat16, **options)
    x = rows_on(group)[:7].reshape(1, 7, HIDDEN)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(layer.params().experts)} == {"bfloat16"}
    given = {"router": model.router} | model.options
    function = jax.jit(lambda params, x: nn.moe_layer_on_mesh(group, params, x, **given))
    out, _ = nnx.jit(lambda layer, x: layer(x))(layer, x)
    expected, _ = function(layer.params(), x)
    np.testing.assert_array_equal(out, expected)
    with pytest.raises(ValueError, match="router with top_k=3"):
        layer_on(group, router=nn.RouterConfig(3))


def test_gradients_and_optimizer_steps_reach_all_parameters(groups):
    group = groups(ep_mesh(as_many(4)), **config())
    layer, x = layer_on(group, balanced=True), rows_on(group)

    grad = nnx.jit(nnx.value_and_grad(loss))
    first, gradients = grad(layer, x)
    assert len(jax.tree.leaves(gradients)) == len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 7
    for gradient in jax.tree.leaves(gradients):
        assert float(jnp.abs(gradient).max()) > 0
    state = nnx.state(layer, nnx.Param)
    nnx.update(layer, jax.tree.map(lambda p, g: p - 0.5 * g, state, gradients))
    assert grad(layer, x)[0] < first


def test_the_bias_follows_the_load(groups):
    group = groups(ep_mesh(as_many(4)), **config())
    layer, x = layer_on(group, balanced=True), rows_on(group)

    @nnx.jit
    def step(layer, x):
        _, aux = layer(x)
        layer.update_balance(aux, rate=0.5)
        return aux.load

    load = step(layer, x)
    expected = 0.5 * np.sign(np.mean(load) - np.asarray(load))
    np.testing.assert_array_equal(layer.balance_bias[...], expected)
    with pytest.raises(ValueError, match="made with balanced=True"):
        layer_on(group).update_balance(None)


def test_experts_are_split_over_the_ranks(groups):
    group = groups(ep_mesh(as_many(4)), **config())
    layer = layer_on(group)
    (shard, *_) = layer.experts.gate[...].addressable_shards
    assert shard.data.shape == (EXPERTS // group.num_ranks, HIDDEN, 16)
