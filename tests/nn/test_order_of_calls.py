# SPDX-License-Identifier: Apache-2.0
"""Modules that are called several times in a program: in no order, on lanes, along a token."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_smfree import nn
from jax_smfree.nn import equinox as smfree_equinox
from jax_smfree.nn import nnx as smfree_nnx
from nn.functional import config, rows_on
from support import as_many, assert_trees_close, ep_mesh


@pytest.fixture(params=["nnx", "equinox"])
def framework(request):
    """``(make(group), jit, value_and_grad)`` of modules."""
    if request.param == "nnx":
        return (
            lambda group: smfree_nnx.MoeLayer(group, expert_width=16, rngs=nnx.Rngs(0)),
            nnx.jit,
            nnx.value_and_grad,
        )
    return (
        lambda group: smfree_equinox.MoeLayer(group, expert_width=16, key=jax.random.key(0)),
        equinox.filter_jit,
        equinox.filter_value_and_grad,
    )


def test_calls_and_gradients_side_by_side(groups, framework):
    make, jit, value_and_grad = framework
    group = groups(ep_mesh(as_many(4)), **config())
    layer, x = make(group), rows_on(group)

    def loss(layer, x):
        return jnp.mean(layer(x)[0] ** 2)

    def apart(layer, x):
        return layer(x)[0] + layer(-x)[0], loss(layer, x), value_and_grad(loss)(layer, 2 * x)

    out, value, (other_value, gradient) = jit(apart)(layer, x)
    alone = jit(lambda layer, x: layer(x)[0])
    np.testing.assert_array_equal(out, alone(layer, x) + alone(layer, -x))
    np.testing.assert_allclose(value, jit(loss)(layer, x), rtol=1e-6)
    expected = jit(value_and_grad(loss))(layer, 2 * x)
    assert_trees_close((other_value, gradient), expected, 1e-6)


def test_a_token_through_two_calls(groups, framework):
    """It orders them, and goes on behind them; gradients find their way back along it."""
    make, jit, value_and_grad = framework
    group = groups(ep_mesh(as_many(4)), **config())
    layer, x = make(group), rows_on(group)

    def both(layer, x):
        token, first, _ = layer(x, token=group.token())
        token, second, _ = layer(-x, token=token)
        return jnp.mean(first * second), token

    def total(layer, x):
        return both(layer, x)[0]

    value, token = jit(both)(layer, x)
    alone = jit(lambda layer, x: layer(x)[0])
    np.testing.assert_allclose(value, jnp.mean(alone(layer, x) * alone(layer, -x)), rtol=1e-6)
    again, gradient = jit(value_and_grad(total))(layer, x)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    assert token.state is None
    _, out, _ = jit(lambda layer, x, token: layer(x, token=token))(layer, x, token)
    np.testing.assert_array_equal(out, alone(layer, x))


def test_two_lanes(groups, framework):
    make, jit, _ = framework
    group = groups(ep_mesh(as_many(4)), **config(num_lanes=2))
    layer, x = make(group), rows_on(group)
    out = jit(lambda layer, x: layer(x, lane=0)[0] + layer(-x, lane=1)[0])(layer, x)
    alone = jit(lambda layer, x: layer(x)[0])
    np.testing.assert_array_equal(out, alone(layer, x) + alone(layer, -x))


def test_a_token_of_another_group(groups):
    group, other = (groups(ep_mesh(as_many(4)), **config()) for _ in range(2))
    params = nn.init_moe_on_mesh(jax.random.key(0), group, expert_width=16)
    with pytest.raises(ValueError, match=r"got a token of another group, expected .*group.token"):
        nn.moe_layer_on_mesh(group, params, rows_on(group), token=other.token())
