# SPDX-License-Identifier: Apache-2.0
"""Which experts a row visits, and with which weights.

A `RouterConfig` says how the scores of a row become a choice and weights, so that one `route`
serves the routers of all common models; docs/moe_layer.md has a table of them. What keeps the
experts equally busy is in balance.py, redundant copies of experts are in physical.py.

Everything is computed and returned in float32 and int32, whatever ``jax_enable_x64`` and
``jax_numpy_dtype_promotion`` say.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_smfree._src import arguments


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How the scores of a row become a choice of experts and their weights. Static and hashable.

    The steps of `route`, with the fields that decide them:

    1. *Scores* of all E experts from the logits, by ``score``.
    2. *Groups*: with ``num_groups > 1`` the experts are that many groups of neighbours, of which
       the ``groups_kept`` with the highest ``group_score`` stay in the choice: the best score in
       the group (DeepSeek-V2), or the sum of its two best (DeepSeek-V3).
    3. *Choice* of the ``top_k`` highest scores; of equal ones the expert with the lower index.
    4. *Weights*: the scores of the chosen experts; with ``normalise`` over their sum plus
       ``epsilon``; times ``scale``. With ``softmax="after"`` they are a softmax over the chosen
       logits instead, and their choice is by logits.

    Attributes:
      top_k: K, experts per row.
      score: ``"softmax"`` over the experts, ``"sigmoid"``, or ``"sqrt_softplus"``, which is
        ``sqrt(log(1 + exp(logit)))``.
      normalise: whether the weights of a row are divided by their sum. A row that visits one expert
        would always give it the weight 1, and the router would learn nothing, so ``top_k=1`` needs
        ``normalise=False``.
      epsilon: added to the sum that ``normalise`` divides by.
      scale: factor on the weights, called routed scaling factor in DeepSeek's models.
      num_groups: groups of experts; 1 for no groups.
      groups_kept: how many groups a row may choose experts of.
      group_score: ``"max"`` or ``"top2"``.
      softmax: ``"before"`` the choice, over all experts, or ``"after"`` it, over the chosen ones,
        whose weights then sum to 1 (times ``scale``) without ``normalise``. The latter has the
        values of ``"before"`` with ``normalise`` and is there for models that have it so.

    Raises:
      ValueError, TypeError: for a value outside of what is said above.

    Example:
      >>> deepseek_v3 = nn.RouterConfig(8, score="sigmoid", scale=2.5, num_groups=8,
      ...                               groups_kept=4, group_score="top2")
      >>> gpt_oss = nn.RouterConfig(4, softmax="after")
      >>> llama_4 = nn.RouterConfig(1, score="sigmoid", normalise=False)
    """

    top_k: int
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    normalise: bool = True
    epsilon: float = 1e-20
    scale: float = 1.0
    num_groups: int = 1
    groups_kept: int = 1
    group_score: Literal["max", "top2"] = "max"
    softmax: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        name = "RouterConfig"
        for field in ("top_k", "num_groups", "groups_kept"):
            self._set(field, arguments.integer(name, field, getattr(self, field)))
        self._set("normalise", arguments.flag(name, "normalise", self.normalise))
        self._set("scale", arguments.positive(name, "scale", self.scale))
        expected = "a number from 0 on"
        epsilon = arguments.number(name, "epsilon", self.epsilon, expected)
        if epsilon < 0:
            raise ValueError(f"{name}: got epsilon={epsilon}, expected {expected}.")
        self._set("epsilon", epsilon)
        arguments.choice(name, "score", self.score, ("softmax", "sigmoid", "sqrt_softplus"))
        arguments.choice(name, "group_score", self.group_score, ("max", "top2"))
        arguments.choice(name, "softmax", self.softmax, ("before", "after"))
        if self.groups_kept > self.num_groups:
            raise ValueError(
                f"{name}: got groups_kept={self.groups_kept}, expected at most num_groups, which "
                f"is {self.num_groups}."
            )
        if self.softmax == "after" and self.score != "softmax":
            raise ValueError(
                f'{name}: got softmax="after" with score={self.score!r}, expected '
                'score="softmax": other scores have no softmax to place.'
            )
        if self.top_k == 1 and (self.normalise or self.softmax == "after"):
            given = 'softmax="after"' if self.softmax == "after" else "normalise=True"
            cure = 'softmax="before", ' if self.softmax == "after" else ""
            raise ValueError(
                f"{name}: got top_k=1 with {given}, expected {cure}normalise=False: otherwise "
                "every weight would be 1, and the router would learn nothing."
            )

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)


class Routes(NamedTuple):
    """The decision for T rows: the operands of ``dispatch_send``, and what losses are made of.

    A router of your own returns one too, and so do recorded routes; fields that no loss needs may
    be zero. A row whose ``topk_idx`` are all -1 goes nowhere and counts in no loss.
    """

    topk_idx: Array  # int32 [T, K], by falling score; -1 for no expert
    topk_weights: Array  # float32 [T, K], not negative; 0 where topk_idx is -1
    probabilities: Array  # float32 [T, E], the scores over their sum; 0 in rows that go nowhere
    logits: Array  # float32 [T, E], with the router's bias; 0 in rows that go nowhere


def route(
    x: Array,
    weight: Array,
    config: RouterConfig,
    *,
    bias: Array | None = None,
    balance_bias: Array | None = None,
    mask: Array | None = None,
) -> Routes:
    """Experts and weights of every row, in float32.

    Shapes: ``x`` [T, H], ``weight`` [H, E], ``bias`` and ``balance_bias`` [E], ``mask`` [T].
    Differentiation: reaches ``x``, ``weight`` and ``bias`` through the weights, the probabilities
    and the logits. The choice itself and ``balance_bias`` get none. Weights and gradients are
    finite for all finite logits, also where all chosen scores of a row are 0 in float32.
    Precision: operands are float32; on GPUs and TPUs ``jax_default_matmul_precision`` says how
    they are multiplied.

    Args:
      x: the rows.
      weight: the router's parameters, float32 [H, E].
      config: a `RouterConfig`.
      bias: added to the logits (gpt-oss).
      balance_bias: added to the scores where groups and experts are chosen, never in the weights
        (``e_score_correction_bias`` of DeepSeek-V3); see `update_balance_bias`. With
        ``softmax="after"``, where the choice is by logits, it is added to those.
      mask: bool; rows that are False (padding) go nowhere and count nowhere, and what stands in
        them reaches nothing, NaN included.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes, or a ``config`` that asks for more than
        E experts have.

    Groups that are not kept are never chosen from: their scores count as minus infinity, as in
    DeepSeek's own code. Ports that fill in 0.0 instead (several in transformers, not that of
    DeepSeek-V3) choose differently where ``balance_bias`` makes all scores of a kept group
    negative.

    Example:
      >>> config = nn.RouterConfig(top_k=2)
      >>> routes = nn.route(jnp.ones((3, 8)), jnp.eye(8, 4), config)
      >>> routes.topk_idx.shape, routes.topk_weights.sum(axis=1)
      ((3, 2), Array([1., 1., 1.], dtype=float32))
      >>> mask = jnp.array([True, False, True])
      >>> nn.route(jnp.ones((3, 8)), jnp.eye(8, 4), config, mask=mask).topk_idx[1]
      Array([-1, -1], dtype=int32)
    """
    name = "route"
    x = arguments.array(name, "x", x, ("T", "H"))
    weight = arguments.array(name, "weight", weight, (x.shape[1], "E"))
    experts = weight.shape[1]
    _check_config(name, config, experts)
    if mask is not None:
        mask = arguments.array(name, "mask", mask, (x.shape[0],), np.bool_)[:, None]
        x = jnp.where(mask, x, jnp.zeros_like(x))
    logits = jnp.matmul(
        x.astype(jnp.float32), weight.astype(jnp.float32), preferred_element_type=jnp.float32
    )
    if bias is not None:
        bias = arguments.array(name, "bias", bias, (experts,))
        logits = logits + bias.astype(jnp.float32)[None, :]

    scores, log_scores = _scores(logits, config)
    choice = jax.lax.stop_gradient(scores_of_choice(logits, config))
    if balance_bias is not None:
        balance_bias = arguments.array(name, "balance_bias", balance_bias, (experts,))
        choice = choice + jax.lax.stop_gradient(balance_bias).astype(jnp.float32)[None, :]
    topk_idx = _choose(choice, config)
    topk_weights = _weights(scores, log_scores, topk_idx, config)
    probabilities = scores if config.score == "softmax" else jax.nn.softmax(log_scores, axis=-1)
    if mask is not None:
        topk_idx = jnp.where(mask, topk_idx, jnp.int32(-1))
        topk_weights, probabilities, logits = (
            jnp.where(mask, of_rows, jnp.float32(0))
            for of_rows in (topk_weights, probabilities, logits)
        )
    return Routes(topk_idx, topk_weights, probabilities, logits)


def scores_of_choice(logits: Array, config: RouterConfig) -> Array:
    """What the choice compares, float32 [T, E], before ``balance_bias`` is added."""
    return logits if config.softmax == "after" else _scores(logits, config)[0]


def _scores(logits: Array, config: RouterConfig) -> tuple[Array, Array]:
    """The scores [T, E] and their logarithms, which stay finite where the scores are 0."""
    if config.score == "softmax":
        return jax.nn.softmax(logits, axis=-1), jax.nn.log_softmax(logits, axis=-1)
    if config.score == "sigmoid":
        return jax.nn.sigmoid(logits), jax.nn.log_sigmoid(logits)
    # softplus(z) is exp(z) in float32 below -17. From its logarithm the square root has a gradient
    # where it is 0, too.
    small = logits < -17
    log_softplus = jnp.where(
        small, logits, jnp.log(jax.nn.softplus(jnp.where(small, jnp.float32(0), logits)))
    )
    log_scores = jnp.float32(0.5) * log_softplus
    return jnp.exp(log_scores), log_scores


def _choose(scores: Array, config: RouterConfig) -> Array:
    """int32 [T, K] from the scores [T, E] that decide."""
    if config.groups_kept < config.num_groups:
        rows, experts = scores.shape
        grouped = scores.reshape(rows, config.num_groups, experts // config.num_groups)
        best, _ = jax.lax.top_k(grouped, 2 if config.group_score == "top2" else 1)
        _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), config.groups_kept)
        groups = jnp.arange(config.num_groups, dtype=kept.dtype)
        is_kept = jnp.any(kept[:, :, None] == groups[None, None, :], axis=1)
        grouped = jnp.where(is_kept[:, :, None], grouped, jnp.float32(-jnp.inf))
        scores = grouped.reshape(rows, experts)
    _, topk_idx = jax.lax.top_k(scores, config.top_k)
    return topk_idx.astype(jnp.int32)


def _weights(scores: Array, log_scores: Array, topk_idx: Array, config: RouterConfig) -> Array:
    """float32 [T, K].

    ``s / (sum(s) + epsilon)`` is a softmax over the logarithms of the scores and of epsilon. In
    that form neither it nor its gradient is 0 / 0 or overflows, as 1 / epsilon**2 does.
    """
    if config.softmax == "after" or config.normalise:
        logs = jnp.take_along_axis(log_scores, topk_idx, axis=-1)
        if config.softmax == "before" and config.epsilon > 0:
            epsilon = jnp.full_like(logs[:, :1], math.log(config.epsilon))
            logs = jnp.concatenate([logs, epsilon], axis=-1)
        weights = jax.nn.softmax(logs, axis=-1)[:, : config.top_k]
    else:
        weights = jnp.take_along_axis(scores, topk_idx, axis=-1)
    return weights if config.scale == 1 else weights * jnp.float32(config.scale)


def _check_config(where: str, config: RouterConfig, experts: int) -> None:
    """The config fits so many experts."""
    arguments.instance(where, "config", config, RouterConfig)
    if experts % config.num_groups:
        raise ValueError(
            f"{where}: got num_groups={config.num_groups} with {experts} experts, expected a "
            "divisor of them."
        )
    of_group = experts // config.num_groups
    arguments.integer(where, "top_k", config.top_k, most=config.groups_kept * of_group)
    if config.group_score == "top2" and config.groups_kept < config.num_groups and of_group < 2:
        raise ValueError(
            f'{where}: got group_score="top2" with {config.num_groups} groups of {experts} '
            "experts, expected groups of at least two."
        )


def balanced_routes(num_tokens: int, num_experts: int, top_k: int) -> Routes:
    """Forced balance, for benchmarks: loads that differ by one at most, whatever the rows are.

    Shapes: as `route` gives them for T, E and K. Weights are 1 / K, probabilities 1 / E, logits 0.
    The experts of a row are about E / K apart, so that a row goes to as many ranks as it can: the
    most bytes that balanced routes may send.

    Raises:
      ValueError, TypeError: for what are no sizes, or more experts per row than there are.

    Example:
      >>> nn.balanced_routes(3, num_experts=4, top_k=2).topk_idx
      Array([[0, 2],
             [1, 3],
             [0, 2]], dtype=int32)
    """
    name = "balanced_routes"
    num_tokens = arguments.integer(name, "num_tokens", num_tokens, least=0)
    num_experts = arguments.integer(name, "num_experts", num_experts)
    top_k = arguments.integer(name, "top_k", top_k, most=num_experts)
    # Rows take K after K of this order, from its end back to its beginning.
    order = np.argsort(np.arange(num_experts) % (num_experts // top_k), kind="stable")
    rows = jnp.arange(num_tokens, dtype=jnp.int32)[:, None] % num_experts
    places = (rows * top_k + jnp.arange(top_k, dtype=jnp.int32)[None, :]) % num_experts
    return Routes(
        topk_idx=jnp.asarray(order, jnp.int32)[places],
        topk_weights=jnp.full((num_tokens, top_k), 1 / top_k, jnp.float32),
        probabilities=jnp.full((num_tokens, num_experts), 1 / num_experts, jnp.float32),
        logits=jnp.zeros((num_tokens, num_experts), jnp.float32),
    )
