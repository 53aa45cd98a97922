# SPDX-License-Identifier: Apache-2.0
"""The router at its edges."""

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


def config(top_k, **more):
    return nn.RouterConfig(top_k, normalise=top_k > 1, **more)


def gradients(how, bias=None, scale=1.0):
    """Of a sum in which every row and slot counts differently."""
    x, router = operands()

    def loss(x, router):
        weights = nn.route(x * scale, router, how, balance_bias=bias).topk_weights
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
    none = nn.balanced_routes(3, EXPERTS, 2)._replace(topk_idx=jnp.full((3, 2), -1, jnp.int32))
    loss, gradient = jax.value_and_grad(
        lambda p: nn.load_balancing_loss(none._replace(probabilities=p))
    )(none.probabilities)
    assert loss == 0 and not gradient.any()
    assert nn.load_balancing_loss(nn.balanced_routes(0, EXPERTS, 2)) == 0
    bias = jnp.linspace(-1, 1, EXPERTS)
    np.testing.assert_array_equal(nn.update_balance_bias(bias, load), bias)


def test_one_expert_per_row_teaches_the_router():
    x, router = operands()
    routes = nn.route(x, router, config(1))
    np.testing.assert_array_equal(routes.topk_weights[:, 0], routes.probabilities.max(axis=1))
    assert all(jnp.abs(gradient).max() > 1e-3 for gradient in gradients(config(1)))


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_a_bias_that_chooses_impossible_experts_makes_no_nan(top_k):
    """Logits of thousands: most probabilities are zero in float32, and the bias takes those."""
    bias = jnp.arange(EXPERTS) * 10.0
    x, router = operands()
    routes = nn.route(x * 1e4, router, config(top_k), balance_bias=bias)
    assert (routes.topk_idx[:, 0] == EXPERTS - 1).all()
    assert (routes.probabilities == 0).any()
    assert jnp.isfinite(routes.topk_weights).all()
    # The sum of the chosen scores may be far below epsilon, and the weights with it.
    assert (routes.topk_weights >= 0).all()
    assert (routes.topk_weights.sum(axis=1) <= 1 + 1e-6).all()
    for gradient in gradients(config(top_k), bias, scale=1e4):
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("top_k", [2, 3])
def test_weights_are_probabilities_over_their_sum(top_k):
    x, router = operands()
    routes = nn.route(x, router, config(top_k), balance_bias=jnp.linspace(0.3, 0, EXPERTS))
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
TWO = nn.RouterConfig(2)
REFUSED = {
    "a scalar bias": (
        functools.partial(nn.route, X, ROUTER, TWO, balance_bias=jnp.float32(1)),
        ValueError, r"balance_bias\[\], expected balance_bias\[5\]",
    ),
    "a number as bias": (
        functools.partial(nn.route, X, ROUTER, TWO, balance_bias=1.0),
        TypeError, r"got 1\.0 as balance_bias, expected an array \[5\]",
    ),
    "a bias of a batch": (
        functools.partial(nn.route, X, ROUTER, TWO, balance_bias=jnp.zeros((1, EXPERTS))),
        ValueError, r"balance_bias\[1, 5\]",
    ),
    "more experts than there are": (
        functools.partial(nn.route, X, ROUTER, nn.RouterConfig(6)),
        ValueError, "top_k=6.*at most 5",
    ),
    "no expert": (functools.partial(nn.RouterConfig, 0), ValueError, "top_k=0"),
    "rows of another width": (
        functools.partial(nn.route, X[:, :4], ROUTER, TWO),
        ValueError, r"weight\[8, 5\], expected weight\[4, E\]",
    ),
    "integer rows": (
        functools.partial(nn.route, X.astype(int), ROUTER, TWO),
        TypeError, "x of int.*, expected fl",
    ),
    "float ids": (functools.partial(nn.expert_load, X, 5), TypeError, "expected integers"),
    "flat ids": (
        functools.partial(nn.expert_load, np.zeros(3, int), 5), ValueError, r"topk_idx\[3\]",
    ),
    "traced sizes": (
        lambda: jax.jit(nn.expert_load)(np.zeros((3, 1), int), 5), TypeError, "It is static",
    ),
    "probabilities of others": (
        lambda: nn.load_balancing_loss(nn.balanced_routes(3, 5, 2)._replace(probabilities=X)),
        ValueError, r"routes.probabilities\[6, 8\], expected routes.probabilities\[3, E\]",
    ),
    "one expert, normalised": (
        functools.partial(nn.RouterConfig, 1), ValueError, "expected normalise=False: .* learn",
    ),
    "a softmax of sigmoids": (
        functools.partial(nn.RouterConfig, 2, score="sigmoid", softmax="after"),
        ValueError, "other scores have no softmax",
    ),
    "more groups than there are": (
        functools.partial(nn.RouterConfig, 2, groups_kept=2), ValueError, "groups_kept=2",
    ),
    "groups of unequal sizes": (
        functools.partial(nn.route, X, ROUTER, nn.RouterConfig(2, num_groups=2)),
        ValueError, "num_groups=2 with 5 experts",
    ),
    "more experts than the groups have": (
        functools.partial(nn.route, X, ROUTER, nn.RouterConfig(2, num_groups=5)),
        ValueError, "top_k=2, expected a positive integer of at most 1",
    ),
    "the two best of one": (
        functools.partial(
            nn.route, X, ROUTER,
            nn.RouterConfig(2, num_groups=5, groups_kept=2, group_score="top2"),
        ),
        ValueError, "groups of at least two",
    ),
    "a mask of numbers": (
        functools.partial(nn.route, X, ROUTER, TWO, mask=np.ones(ROWS, int)),
        TypeError, "expected bool",
    ),
    "a number for a config": (functools.partial(nn.route, X, ROUTER, 2), TypeError, "RouterConfig"),
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
