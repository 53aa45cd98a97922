# SPDX-License-Identifier: Apache-2.0
"""The router and the two ways to keep experts equally busy, at their edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_smfree import nn

ROWS, HIDDEN, EXPERTS = 6, 8, 5


def operands():
    x = jax.random.normal(jax.random.key(0), (ROWS, HIDDEN))
    return x, jax.random.normal(jax.random.key(1), (HIDDEN, EXPERTS))


def gradients(top_k, bias=None, scale=1.0):
    """Of a sum in which every row and slot counts differently."""
    x, router = operands()

    def loss(x, router):
        weights = nn.route(x * scale, router, top_k, balance_bias=bias).topk_weights
        return jnp.sum(weights * jnp.arange(1.0, weights.size + 1).reshape(weights.shape))

    return jax.grad(loss, (0, 1))(x, router)


def test_no_expert_counts_nowhere():
    idx = jnp.array([[0, -1], [-1, -1], [2, 3]], jnp.int32)
    np.testing.assert_array_equal(nn.expert_load(idx, EXPERTS), [1, 0, 1, 1, 0])
    none = jnp.full((4, 2), -1, jnp.int32)
    np.testing.assert_array_equal(nn.expert_load(none, EXPERTS), np.zeros(EXPERTS))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.uint32])
def test_load_of_any_integers(dtype):
    idx = jnp.array([[0, 4], [4, 300 % 256]], dtype)
    load = nn.expert_load(idx, num_experts=400)
    assert load.dtype == jnp.int32
    assert {i: int(n) for i, n in enumerate(load) if n} == {0: 1, 4: 2, 44: 1}


def test_a_rank_without_rows_has_no_loss_and_moves_no_bias():
    load = nn.expert_load(jnp.full((3, 2), -1, jnp.int32), EXPERTS)
    probabilities = jnp.full((3, EXPERTS), 1 / EXPERTS)
    loss, gradient = jax.value_and_grad(nn.load_balancing_loss)(probabilities, load)
    assert loss == 0 and not gradient.any()
    assert nn.load_balancing_loss(jnp.zeros((0, EXPERTS)), load) == 0
    bias = jnp.linspace(-1, 1, EXPERTS)
    np.testing.assert_array_equal(nn.update_balance_bias(bias, load), bias)


def test_one_expert_per_row_teaches_the_router():
    x, router = operands()
    routes = nn.route(x, router, 1)
    np.testing.assert_array_equal(routes.topk_weights[:, 0], routes.probabilities.max(axis=1))
    assert all(jnp.abs(gradient).max() > 1e-3 for gradient in gradients(top_k=1))


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_a_bias_that_chooses_impossible_experts_makes_no_nan(top_k):
    """Logits of thousands: most probabilities are zero in float32, and the bias takes those."""
    bias = jnp.arange(EXPERTS) * 10.0
    x, router = operands()
    routes = nn.route(x * 1e4, router, top_k, balance_bias=bias)
    assert (routes.topk_idx[:, 0] == EXPERTS - 1).all()
    assert (routes.probabilities == 0).any()
    assert jnp.isfinite(routes.topk_weights).all()
    if top_k > 1:
        np.testing.assert_allclose(routes.topk_weights.sum(axis=1), 1, rtol=1e-6)
    for gradient in gradients(top_k, bias, scale=1e4):
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("top_k", [2, 3])
def test_weights_are_probabilities_over_their_sum(top_k):
    x, router = operands()
    routes = nn.route(x, router, top_k, balance_bias=jnp.linspace(0.3, 0, EXPERTS))
    chosen = jnp.take_along_axis(routes.probabilities, routes.topk_idx, axis=1)
    expected = chosen / chosen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(routes.topk_weights, expected, rtol=1e-5)


def test_the_bias_takes_a_rate_from_a_schedule():
    bias, load = jnp.zeros(EXPERTS), jnp.arange(EXPERTS)
    step = jax.jit(nn.update_balance_bias)
    np.testing.assert_array_equal(
        step(bias, load, jnp.float32(0.5)), jnp.array([0.5, 0.5, 0, -0.5, -0.5])
    )


X, ROUTER = np.zeros((ROWS, HIDDEN), np.float32), np.zeros((HIDDEN, EXPERTS), np.float32)
PROBABILITIES = np.zeros((ROWS, EXPERTS), np.float32)
REFUSED = {
    "a scalar bias": (
        functools.partial(nn.route, X, ROUTER, 2, balance_bias=jnp.float32(1)),
        ValueError, r"balance_bias\[\], expected balance_bias\[5\]",
    ),
    "a number as bias": (
        functools.partial(nn.route, X, ROUTER, 2, balance_bias=1.0),
        TypeError, r"got 1\.0 as balance_bias, expected an array \[5\]",
    ),
    "a bias of a batch": (
        functools.partial(nn.route, X, ROUTER, 2, balance_bias=jnp.zeros((1, EXPERTS))),
        ValueError, r"balance_bias\[1, 5\]",
    ),
    "more experts than there are": (
        functools.partial(nn.route, X, ROUTER, 6), ValueError, "top_k=6.*at most 5",
    ),
    "no expert": (functools.partial(nn.route, X, ROUTER, 0), ValueError, "top_k=0"),
    "rows of another width": (
        functools.partial(nn.route, X[:, :4], ROUTER, 2),
        ValueError, r"router\[8, 5\], expected router\[4, E\]",
    ),
    "integer rows": (
        functools.partial(nn.route, X.astype(int), ROUTER, 2), TypeError, "x of int.*, expected fl",
    ),
    "float ids": (functools.partial(nn.expert_load, X, 5), TypeError, "expected integers"),
    "flat ids": (
        functools.partial(nn.expert_load, np.zeros(3, int), 5), ValueError, r"topk_idx\[3\]",
    ),
    "traced sizes": (
        lambda: jax.jit(nn.expert_load)(np.zeros((3, 1), int), 5), TypeError, "It is static",
    ),
    "load of others": (
        functools.partial(nn.load_balancing_loss, PROBABILITIES, np.zeros(4, int)),
        ValueError, r"load\[4\], expected load\[5\]",
    ),
    "rate": (
        functools.partial(nn.update_balance_bias, np.zeros(5), np.zeros(5), rate="fast"),
        TypeError, "rate='fast'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        call()
