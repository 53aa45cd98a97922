# SPDX-License-Identifier: Apache-2.0
"""The router of every model against that model's own steps, written as plainly as possible.

Rows are the logits themselves, times an identity, so that a test decides every score, ties
included. Scores that are compared come from one grid of numbers on both sides; of equal ones the
expert with the lower index wins.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_smfree import nn
from property.strategies import examples

ROWS, EXPERTS, GROUPS, KEPT, TOP_K = 4, 8, 4, 2, 3
EYE = jnp.eye(EXPERTS)


def largest(scores, number):
    """Indices of the largest scores of each row, in order."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :number]


def only_groups(scores, group_scores):
    """Minus infinity in all groups but the best ones."""
    scores = scores.reshape(ROWS, GROUPS, -1).copy()
    for row, kept in enumerate(largest(group_scores, KEPT)):
        for group in set(range(GROUPS)) - set(kept.tolist()):
            scores[row, group] = -np.inf
    return scores.reshape(ROWS, EXPERTS)


def softmax(logits):
    exp = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def sigmoid(logits):
    return 1 / (1 + jnp.exp(-logits))


def take(values, idx):
    return jnp.take_along_axis(values, idx, axis=1)


# ---- per model: the choice, from logits, bias and balance bias; the weights of that choice -------


def choose_by_softmax(logits, bias, correction):
    return largest(np.asarray(jax.nn.softmax(logits)), TOP_K)


def weigh_normalised(logits, bias, idx):
    """Mixtral, Qwen3-MoE, Qwen3-Next with norm_topk_prob."""
    chosen = take(softmax(logits), idx)
    return chosen / chosen.sum(axis=1, keepdims=True)


def weigh_as_it_is(logits, bias, idx):
    """OLMoE, Qwen2-MoE: norm_topk_prob is False."""
    return take(softmax(logits), idx)


def choose_one(logits, bias, correction):
    return largest(np.asarray(logits), 1)


def choose_deepseek_v2(logits, bias, correction):
    scores = np.asarray(jax.nn.softmax(logits))
    best_of_group = scores.reshape(ROWS, GROUPS, -1).max(axis=2)
    return largest(only_groups(scores, best_of_group), TOP_K)


def weigh_deepseek_v2(logits, bias, idx):
    return 16.0 * take(softmax(logits), idx)


def choose_deepseek_v3(logits, bias, correction):
    scores = np.asarray(jax.nn.sigmoid(logits)) + correction
    two_best = np.sort(scores.reshape(ROWS, GROUPS, -1), axis=2)[:, :, -2:]
    return largest(only_groups(scores, two_best.sum(axis=2)), TOP_K)


def weigh_deepseek_v3(logits, bias, idx):
    chosen = take(sigmoid(logits), idx)
    return 2.5 * chosen / (chosen.sum(axis=1, keepdims=True) + 1e-20)


def choose_glm_4_5(logits, bias, correction):
    """One group: all experts."""
    return largest(np.asarray(jax.nn.sigmoid(logits)) + correction, TOP_K)


def choose_gpt_oss(logits, bias, correction):
    return largest(np.asarray(logits) + bias, TOP_K)


def weigh_gpt_oss(logits, bias, idx):
    return softmax(take(logits + bias, idx))


def weigh_llama_4(logits, bias, idx):
    return sigmoid(take(logits, idx))


def choose_deepseek_v4(logits, bias, correction):
    scores = np.asarray(jnp.sqrt(jax.nn.softplus(logits)))
    return largest(scores + correction, TOP_K)


def weigh_deepseek_v4(logits, bias, idx):
    chosen = jnp.sqrt(jnp.log(1 + jnp.exp(take(logits, idx))))
    return 1.5 * chosen / chosen.sum(axis=1, keepdims=True)


Config = functools.partial(nn.RouterConfig, TOP_K)
MODELS = {
    "Mixtral, Qwen3-MoE": (Config(), choose_by_softmax, weigh_normalised),
    "OLMoE, Qwen2-MoE": (Config(normalise=False), choose_by_softmax, weigh_as_it_is),
    "Switch": (nn.RouterConfig(1, normalise=False), choose_one, weigh_as_it_is),
    "DeepSeek-V2": (
        Config(normalise=False, scale=16.0, num_groups=GROUPS, groups_kept=KEPT),
        choose_deepseek_v2, weigh_deepseek_v2,
    ),
    "DeepSeek-V3": (
        Config(score="sigmoid", scale=2.5, num_groups=GROUPS, groups_kept=KEPT,
               group_score="top2"),
        choose_deepseek_v3, weigh_deepseek_v3,
    ),
    "GLM-4.5, Kimi K2": (
        Config(score="sigmoid", scale=2.5), choose_glm_4_5, weigh_deepseek_v3,
    ),
    "gpt-oss": (Config(softmax="after"), choose_gpt_oss, weigh_gpt_oss),
    "Llama-4": (
        nn.RouterConfig(1, score="sigmoid", normalise=False), choose_one, weigh_llama_4,
    ),
    "square root of softplus": (
        Config(score="sqrt_softplus", scale=1.5), choose_deepseek_v4, weigh_deepseek_v4,
    ),
}  # fmt: skip
BIASED = ("gpt-oss",)
CORRECTED = ("DeepSeek-V3", "GLM-4.5, Kimi K2", "square root of softplus")


def on_a_grid(draw, grid, shape):
    size = int(np.prod(shape))
    values = draw(st.lists(st.sampled_from(grid), min_size=size, max_size=size))
    return np.array(values, np.float32).reshape(shape)


@st.composite
def operands(draw):
    """Logits with many ties, a bias, and one that makes the scores of whole groups negative."""
    logits = on_a_grid(draw, [0.0, 0.5, 1.0, 1.5, 2.0, 3.0], (ROWS, EXPERTS))
    bias = on_a_grid(draw, [0.0, -0.5, 2.0], EXPERTS)
    return logits, bias, on_a_grid(draw, [0.0, 0.3125, -2.0], EXPERTS)


@pytest.mark.parametrize("model", MODELS)
def test_model(model):
    config, choose, weigh = MODELS[model]
    slots = jnp.arange(1.0, ROWS * config.top_k + 1).reshape(ROWS, config.top_k)

    def routed(logits, bias, correction):
        biases = {"bias": bias} if model in BIASED else {}
        corrections = {"balance_bias": correction} if model in CORRECTED else {}
        routes = nn.route(logits, EYE, config, **biases, **corrections)
        return jnp.sum(routes.topk_weights * slots), routes

    def plain(logits, bias, idx):
        weights = weigh(logits, bias, idx)
        return jnp.sum(weights * slots), weights

    ours = jax.jit(jax.grad(routed, (0, 1), has_aux=True))
    theirs = jax.jit(jax.grad(plain, (0, 1), has_aux=True))

    @examples(60)
    @given(operands())
    def check(drawn):
        logits, bias, correction = drawn
        gradients, routes = ours(logits, bias, correction)
        np.testing.assert_array_equal(routes.topk_idx, choose(logits, bias, correction))
        expected, weights = theirs(logits, bias, routes.topk_idx)
        np.testing.assert_allclose(routes.topk_weights, weights, rtol=1e-5)
        for mine, plainly in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(mine, plainly, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(routes.probabilities.sum(axis=1), 1, rtol=1e-5)

    check()


@pytest.mark.parametrize("model", MODELS)
def test_extreme_logits_make_no_nan(model):
    """Scores that are 0 in float32, alone and in sum, and a choice that the bias forces."""
    config = MODELS[model][0]
    slots = jnp.arange(1.0, ROWS * config.top_k + 1).reshape(ROWS, config.top_k)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(logits, correction):
        routes = nn.route(logits, EYE, config, balance_bias=correction)
        weights = routes.topk_weights
        return jnp.sum(weights * slots) + jnp.sum(routes.probabilities[:, 0]), weights

    @examples(60)
    @given(st.data())
    def check(data):
        logits = on_a_grid(data.draw, [0.0, -1e4, 1e4, -100.0, -17.0, 90.0], (ROWS, EXPERTS))
        correction = on_a_grid(data.draw, [0.0, 1e5], EXPERTS)
        (total, weights), gradient = step(logits, correction)
        assert np.isfinite(total) and np.isfinite(gradient).all()
        assert (np.asarray(weights) >= 0).all()

    check()


def test_masked_rows_go_nowhere_and_reach_nothing():
    """Not even as NaN. The other rows are as without a mask."""
    config = MODELS["DeepSeek-V3"][0]
    mask = np.array([True, False, True, False])
    logits = np.random.default_rng(0).standard_normal((ROWS, EXPERTS)).astype(np.float32)

    def loss(x, weight, mask):
        routes = nn.route(x, weight, config, mask=mask)
        losses = nn.load_balancing_loss(routes) + nn.router_z_loss(routes)
        return jnp.sum(routes.topk_weights[:, 0]) + losses, routes

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    dirty = np.where(mask[:, None], logits, np.nan)
    (value, routes), gradients = step(dirty, EYE, mask)
    assert (routes.topk_idx[~mask] == -1).all() and (routes.topk_idx[mask] >= 0).all()
    assert not routes.topk_weights[~mask].any() and not routes.probabilities[~mask].any()
    assert not routes.logits[~mask].any() and not gradients[0][~mask].any()

    (expected, alone), of_alone = step(logits[mask], EYE, np.ones(2, bool))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[0][mask], of_alone[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradients[1], of_alone[1], rtol=1e-5, atol=1e-6)
    for whole, part in zip(routes, alone, strict=True):
        np.testing.assert_allclose(whole[mask], part, rtol=1e-6)


SIZES = [(0, 4, 2), (1, 8, 3), (5, 7, 1), (6, 4, 4), (7, 12, 5), (16, 9, 2), (20, 8, 2)]


@pytest.mark.parametrize(("rows", "experts", "top_k"), SIZES)
def test_balanced_routes_are_balanced(rows, experts, top_k):
    idx = np.asarray(nn.balanced_routes(rows, experts, top_k).topk_idx)
    assert idx.shape == (rows, top_k)
    assert all(len(set(row)) == top_k for row in idx.tolist())
    load = np.bincount(idx.reshape(-1), minlength=experts)
    assert load.size == experts and load.max() - load.min() <= 1
