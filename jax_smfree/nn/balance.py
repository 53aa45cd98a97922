# SPDX-License-Identifier: Apache-2.0
"""What keeps the experts equally busy, and how busy they are.

* Auxiliary losses. `load_balancing_loss` is smallest when all experts get the same share of the
  rows of a rank, of each sequence, or of the global batch. `router_z_loss` keeps the logits small.
* Without a loss: a bias per expert that counts in the choice of experts only.
  `update_balance_bias` lowers it by a small step for a busy expert, `quantile_balance_bias` sets it
  to what would have balanced the rows at hand.
* `expert_load` counts rows, `load_metrics` makes numbers of them that a training loop can log.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jax_smfree._src import arguments, compat
from jax_smfree._src.group_axis import Axis
from jax_smfree.nn.router import RouterConfig, Routes, scores_of_choice


def expert_load(topk_idx: Array, num_experts: int) -> Array:
    """int32 [E]: how many rows of ``topk_idx`` (integers [T, K], -1 for none) go to each expert.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes.

    Example:
      >>> nn.expert_load(jnp.array([[0, 2], [2, -1]]), num_experts=3)
      Array([1, 0, 2], dtype=int32)
    """
    topk_idx = arguments.array("expert_load", "topk_idx", topk_idx, ("T", "K"), jnp.integer)
    num_experts = arguments.integer("expert_load", "num_experts", num_experts)
    ids = topk_idx.reshape(-1)
    if ids.dtype.itemsize <= 4:
        ids = ids.astype(jnp.int32)
    is_expert = (ids >= 0) & (ids < num_experts)  # a negative index would count from the end
    ids = jnp.where(is_expert, ids, num_experts)
    return jnp.zeros(num_experts, jnp.int32).at[ids].add(jnp.int32(1), mode="drop")


def load_balancing_loss(
    routes: Routes,
    *,
    sequences: int = 1,
    sequence_ids: Array | None = None,
    axes: Axis = (),
) -> Array:
    """``E * sum_e(share of rows of e * mean probability of e)``: 1 if balanced, E at the worst.

    It is the loss of the rows of this rank that go to an expert, 0 if none does. Add a small
    multiple of it to the training loss: 0.01 for this one, 1e-4 where it is per sequence and a bias
    does most of the work (DeepSeek-V3).

    Sources: Lepikhin et al., "GShard", 2020 (arXiv:2006.16668); in this form Fedus et al., "Switch
    Transformers", 2021 (arXiv:2101.03961), equations 4 to 6. Per sequence: DeepSeek-AI,
    "DeepSeek-V3", 2024 (arXiv:2412.19437), equations 17 to 20. Over the global batch: Qiu et al.,
    "Demons in the Detail", 2025 (arXiv:2501.11873).

    Shapes: -> float32 [], the same on all ranks of ``axes``.
    Sharding: with ``axes`` to be called inside ``jax.shard_map``.
    Differentiation: through the probabilities.

    Args:
      routes: from `route`, with the ids of experts and not of their copies (`spread`).
      sequences: how many sequences the rows are. The loss is the mean of the losses of each, over
        those that have rows.
      sequence_ids: int [T], from 0 to ``sequences - 1``: the sequence of each row. Without it the
        sequences are equally long and stand one after the other.
      axes: mesh axes over which counts and probabilities are summed before they are multiplied:
        those of all ranks for the loss of the global batch. With several ``sequences`` sequence i
        of one rank is taken for a part of sequence i of the others, so there they are the axes
        that sequences are split over.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes, or rows that are not so many sequences.

    Example:
      >>> routes = nn.route(x, params.router, nn.RouterConfig(top_k=2))
      >>> bool(nn.load_balancing_loss(routes) > 0.5)
      True
      >>> nn.load_balancing_loss(nn.balanced_routes(16, 8, 2), sequences=4)
      Array(1., dtype=float32)
    """
    name = "load_balancing_loss"
    topk_idx, probabilities = _checked(name, routes)
    axes = _axes(name, axes)
    rows, experts = topk_idx.shape[0], probabilities.shape[1]
    sequences = arguments.integer(name, "sequences", sequences)
    if sequence_ids is None:
        if rows % sequences:
            raise ValueError(
                f"{name}: got {rows} rows as sequences={sequences}, expected a multiple of it. "
                "For sequences of several lengths pass sequence_ids."
            )
        ids = jnp.arange(rows, dtype=jnp.int32) // max(rows // sequences, 1)
    else:
        ids = arguments.array(name, "sequence_ids", sequence_ids, (rows,), jnp.integer)
        ids = jnp.where((ids >= 0) & (ids < sequences), ids, sequences).astype(jnp.int32)

    counted = _counted(topk_idx)
    ids = jnp.where(counted, ids, sequences)  # out of bounds: dropped
    is_expert = (topk_idx >= 0) & (topk_idx < experts)
    experts_of_row = jnp.where(is_expert, topk_idx, experts)
    load = jnp.zeros((sequences, experts), jnp.float32)
    load = load.at[ids[:, None], experts_of_row].add(jnp.float32(1), mode="drop")
    lengths = jnp.zeros(sequences, jnp.float32).at[ids].add(jnp.float32(1), mode="drop")
    if sequence_ids is None:  # a sum along an axis, which is much faster than one by ids
        of_counted = jnp.where(counted[:, None], probabilities, jnp.float32(0))
        sums = jnp.sum(of_counted.reshape(sequences, rows // sequences, experts), axis=1)
    else:
        sums = jnp.zeros((sequences, experts), jnp.float32).at[ids].add(probabilities, mode="drop")
    load, lengths, sums = jax.lax.psum((load, lengths, sums), axes)

    one = jnp.float32(1)
    share = load / jnp.maximum(jnp.sum(load, axis=1, keepdims=True), one)
    mean = sums / jnp.maximum(lengths, one)[:, None]
    losses = jnp.float32(experts) * jnp.sum(share * mean, axis=1)
    nonempty = jnp.sum(lengths > 0, dtype=jnp.float32)
    loss: Array = jnp.sum(losses) / jnp.maximum(nonempty, one)
    return loss


def router_z_loss(routes: Routes, *, axes: Axis = ()) -> Array:
    """The mean over the rows of ``logsumexp(logits) ** 2``, which keeps the logits small.

    It counts the rows that go to an expert, and is 0 if none does. Add 0.001 times it to the
    training loss.
    Source: Zoph et al., "ST-MoE", 2022 (arXiv:2202.08906), equation 5.

    Shapes: -> float32 [].
    Differentiation: through the logits.

    Args:
      routes: from `route`.
      axes: mesh axes whose ranks' rows are all counted; inside of ``jax.shard_map``.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes, or axes of no ``jax.shard_map`` here.

    Example:
      >>> f"{nn.router_z_loss(nn.balanced_routes(16, 8, 2)):.3f}"  # log(8) ** 2
      '4.324'
    """
    name = "router_z_loss"
    topk_idx, probabilities = _checked(name, routes)
    logits = _logits(name, routes, probabilities.shape)
    counted = _counted(topk_idx)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=1))
    total = jnp.sum(jnp.where(counted, squares, jnp.float32(0)))
    rows = jnp.sum(counted, dtype=jnp.float32)
    total, rows = jax.lax.psum((total, rows), _axes(name, axes))
    loss: Array = total / jnp.maximum(rows, jnp.float32(1))
    return loss


def update_balance_bias(bias: Array, load: Array, rate: Array | float = 1e-3) -> Array:
    """The next ``balance_bias`` [E], once per step, from the load [E] summed over all ranks.

    Every expert's bias moves by ``rate``: down if it had more rows than the mean, up if less. It is
    state, not a parameter: keep it away from the optimizer. The result has the dtype of ``bias``.
    Without any load it stays as it is. ``rate`` may be a scalar array, as a schedule returns.
    Sources: Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024 (arXiv:2408.15664);
    DeepSeek-AI, "DeepSeek-V3", 2024 (arXiv:2412.19437), section 2.1.2.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes.

    Example:
      >>> nn.update_balance_bias(jnp.zeros(3), jnp.array([5, 0, 1]), rate=0.5)
      Array([-0.5,  0.5,  0.5], dtype=float32)
    """
    name = "update_balance_bias"
    bias = arguments.array(name, "bias", bias, ("E",))
    load = _load(name, load, bias.shape[0])
    if isinstance(rate, jax.Array):  # of a schedule
        step = arguments.array(name, "rate", rate, ())
    else:
        step = jnp.float32(arguments.number(name, "rate", rate))
    direction = jnp.sign(jnp.mean(load) - load)
    moved: Array = bias + (step.astype(jnp.float32) * direction).astype(bias.dtype)
    return moved


def quantile_balance_bias(
    bias: Array, routes: Routes, config: RouterConfig, *, axes: Axis = ()
) -> Array:
    """The next ``balance_bias`` [E] by quantile balancing, once per step; it has no rate to tune.

    A row visits an expert whose biased score is above the row's threshold, which is its biased
    score of rank K + 1. With thresholds as they are under ``bias``, every expert gets the bias that
    puts T * K / E rows above them. The thresholds then move too, so that it takes a few steps to
    converge. The mean of the result is 0, which changes no choice; its dtype is that of ``bias``.
    Without any rows, or with K = E, it stays as it is.

    Source: Su, "MoE World Tour: 6. Optimal Allocation for Equilibrium", 2026
    (kexue.fm/archives/11619), one alternating step per batch; that is the dual of Sun, "Binary
    Integer Programming Based Algorithm for Expert Load Balancing", 2025 (arXiv:2502.15451), with
    equal loads in place of a bound on them. Quantiles are found here by bisection on the counts of
    all ranks, so that no score leaves its rank.

    Args:
      bias: float [E], that ``routes`` was made with.
      routes: from `route`.
      config: the router, without limits on groups.
      axes: mesh axes whose ranks' rows are all counted; inside of ``jax.shard_map``.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes, or a router that keeps some groups only.

    Example:
      >>> config = nn.RouterConfig(top_k=2)
      >>> routes = nn.route(x, params.router, config)
      >>> bias = nn.quantile_balance_bias(jnp.zeros(8), routes, config)
      >>> bias.shape
      (8,)
    """
    name = "quantile_balance_bias"
    topk_idx, probabilities = _checked(name, routes)
    logits = _logits(name, routes, probabilities.shape)
    experts = logits.shape[1]
    bias = arguments.array(name, "bias", bias, (experts,))
    arguments.instance(name, "config", config, RouterConfig)
    axes = _axes(name, axes)
    if config.groups_kept < config.num_groups:
        raise ValueError(
            f"{name}: got a router with groups_kept={config.groups_kept} of {config.num_groups}, "
            "expected one without limits on groups: with them a row has no one threshold. Use "
            "nn.update_balance_bias."
        )
    if arguments.integer(name, "config.top_k", config.top_k, most=experts) == experts:
        return bias
    scores = jax.lax.stop_gradient(scores_of_choice(logits, config))
    old = jax.lax.stop_gradient(bias).astype(jnp.float32)
    best, _ = jax.lax.top_k(scores + old[None, :], config.top_k + 1)
    counted = _counted(topk_idx)[:, None]
    infinity = jnp.float32(jnp.inf)
    # The bias from which on the row visits the expert.
    needed = jnp.where(counted, best[:, -1:] - scores, infinity)
    rows = jax.lax.psum(jnp.sum(counted, dtype=jnp.float32), axes)
    wanted = rows * jnp.float32(config.top_k) / jnp.float32(experts)
    low = jax.lax.pmin(jnp.min(needed, axis=0, initial=jnp.inf), axes)
    high = jax.lax.pmax(
        jnp.max(jnp.where(counted, needed, -infinity), axis=0, initial=-jnp.inf), axes
    )

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.float32(0.5) * (low + high)
        reached = jax.lax.psum(jnp.sum(needed <= middle[None, :], axis=0, dtype=jnp.float32), axes)
        enough = reached >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, high = jax.lax.fori_loop(0, 30, halve, (low, high))
    moved = jnp.where(rows > 0, high - jnp.mean(high), old)
    return moved.astype(bias.dtype)


def load_metrics(load: Array) -> dict[str, Array]:
    """What a training loop can log of the load [E] of a layer: float32 scalars.

    ``max_over_mean``: rows of the busiest expert over the mean; 1 is balanced, and 1 less is the
    MaxVio of Wang et al., 2024 (arXiv:2408.15664). It is also how much longer the experts of its
    rank compute. ``min_over_mean``: of the idlest. ``idle_share``: experts without any row over
    all. ``entropy``: of the shares, over the logarithm of E; 1 is balanced, 0 one expert for all.
    Without any row the first two and the entropy are 0 and all experts are idle.

    Raises:
      ValueError, TypeError: for a load of another shape or dtype, or of no expert.

    Example:
      >>> nn.load_metrics(jnp.array([6, 2, 0, 0]))["max_over_mean"]
      Array(3., dtype=float32)
    """
    counts = _load("load_metrics", load, "E")
    experts = counts.shape[0]
    if not experts:
        raise ValueError("load_metrics: got load[0], expected that of at least one expert.")
    total = jnp.sum(counts)
    shares = counts / jnp.where(total > 0, total, jnp.float32(1))
    entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares))
    return {
        "max_over_mean": jnp.max(shares) * jnp.float32(experts),
        "min_over_mean": jnp.min(shares) * jnp.float32(experts),
        "idle_share": jnp.mean(counts == 0, dtype=jnp.float32),
        "entropy": entropy / jnp.float32(math.log(experts)) if experts > 1 else jnp.sum(shares),
    }


def _counted(topk_idx: Array) -> Array:
    """bool [T]: the rows that go to an expert."""
    return jnp.any(topk_idx >= 0, axis=1)


def _checked(where: str, routes: Routes) -> tuple[Array, Array]:
    """``topk_idx`` and ``probabilities``, of as many rows."""
    arguments.instance(where, "routes", routes, Routes, "It is what nn.route returns.")
    idx = arguments.array(where, "routes.topk_idx", routes.topk_idx, ("T", "K"), jnp.integer)
    shape = idx.shape[0], "E"
    probabilities = arguments.array(where, "routes.probabilities", routes.probabilities, shape)
    return idx.astype(jnp.int32), probabilities.astype(jnp.float32)


def _logits(where: str, routes: Routes, shape: Sequence[int]) -> Array:
    return arguments.array(where, "routes.logits", routes.logits, shape).astype(jnp.float32)


def _axes(where: str, axes: Axis) -> tuple[str, ...]:
    given = axes if isinstance(axes, tuple) else (axes,)
    if not all(isinstance(axis, str) for axis in given):
        raise TypeError(
            f"{where}: got axes={arguments.shown(axes)}, expected the name of a mesh axis, or a "
            "tuple of them."
        )
    manual = compat.manual_axes()
    if not manual.issuperset(given):
        raise ValueError(
            f"{where}: got axes={arguments.shown(axes)}, expected axes of a jax.shard_map around "
            f"the call; here those are {sorted(manual)}."
        )
    return given


def _load(where: str, load: Array, experts: int | str) -> Array:
    """Counts of rows, as float32: exact up to 2**24, and the shares of larger ones are too."""
    counts = arguments.array(where, "load", load, (experts,), jnp.number)
    return counts.astype(jnp.float32)
