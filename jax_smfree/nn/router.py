# SPDX-License-Identifier: Apache-2.0
"""Which experts a row visits, and two ways to keep the experts equally busy.

* An auxiliary loss that is smallest when all experts get the same share: `load_balancing_loss`.
  Lepikhin et al., "GShard", 2020 (arXiv:2006.16668); in this form Fedus et al., "Switch
  Transformers", 2021 (arXiv:2101.03961), equations 4 to 6.
* Without a loss: a bias per expert that counts in the choice of experts only, and that a fixed
  small step lowers for a busy expert and raises for an idle one: `update_balance_bias`.
  Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024 (arXiv:2408.15664); DeepSeek-AI,
  "DeepSeek-V3", 2024 (arXiv:2412.19437), section 2.1.2.

Everything is computed and returned in float32 and int32, whatever ``jax_enable_x64`` and
``jax_numpy_dtype_promotion`` say.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_smfree._src import arguments


class Routes(NamedTuple):
    """The router's decision for T rows, the operands of ``dispatch_send``."""

    topk_idx: Array  # int32 [T, K], by falling score
    topk_weights: Array  # float32 [T, K], not negative; each row sums to 1 if K > 1
    probabilities: Array  # float32 [T, E]


def route(x: Array, router: Array, top_k: int, *, balance_bias: Array | None = None) -> Routes:
    """Top-k of a softmax, in float32.

    Shapes: ``x`` [T, H], ``router`` [H, E], ``balance_bias`` [E].

    Weights: with ``top_k > 1`` the probabilities of the chosen experts over their sum. With
    ``top_k=1`` that would always be 1, and the router would learn nothing; there the weight is the
    probability itself, as in the Switch Transformer.

    Differentiation: reaches ``x`` and ``router`` through the weights and the probabilities. The
    choice itself and ``balance_bias`` get none.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes, or ``top_k`` outside of [1, E].

    Example:
      >>> routes = nn.route(jnp.ones((3, 8)), jnp.eye(8, 4), top_k=2)
      >>> routes.topk_idx.shape, routes.topk_weights.sum(axis=1)
      ((3, 2), Array([1., 1., 1.], dtype=float32))
    """
    x = arguments.array("route", "x", x, ("T", "H"))
    router = arguments.array("route", "router", router, (x.shape[1], "E"))
    top_k = arguments.integer("route", "top_k", top_k, most=router.shape[1])
    logits = jnp.matmul(
        x.astype(jnp.float32), router.astype(jnp.float32), preferred_element_type=jnp.float32
    )
    probabilities = jax.nn.softmax(logits, axis=-1)
    scores = probabilities
    if balance_bias is not None:
        bias = arguments.array("route", "balance_bias", balance_bias, (router.shape[1],))
        scores = scores + bias.astype(jnp.float32)[None, :]
    _, topk_idx = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)
    if top_k == 1:
        weights = jnp.take_along_axis(probabilities, topk_idx, axis=-1)
    else:
        # The same as the probabilities over their sum, without 0 / 0 where a bias has chosen
        # experts whose probabilities are too small for float32.
        weights = jax.nn.softmax(jnp.take_along_axis(logits, topk_idx, axis=-1), axis=-1)
    return Routes(topk_idx.astype(jnp.int32), weights, probabilities)


def expert_load(topk_idx: Array, num_experts: int) -> Array:
    """int32 [E]: how many rows of ``topk_idx`` (integers [T, K], -1 for none) go to each expert.

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


def load_balancing_loss(probabilities: Array, load: Array) -> Array:
    """``E * sum_e(share of rows of e * mean probability of e)``: 1 if balanced, E at the worst.

    Shapes: ``probabilities`` [T, E], ``load`` [E] (from `expert_load`) -> float32 []. It is the
    loss of this rank's rows, 0 if none of them goes to an expert; add a small multiple (0.01) of it
    to the training loss.
    Differentiation: through the probabilities.
    """
    name = "load_balancing_loss"
    probabilities = arguments.array(name, "probabilities", probabilities, ("T", "E"))
    load = _load(name, load, probabilities.shape[1])
    share = load / jnp.maximum(jnp.sum(load), 1)
    rows, experts = probabilities.shape
    mean = jnp.sum(probabilities.astype(jnp.float32), axis=0) / max(rows, 1)
    loss: Array = experts * jnp.sum(share * mean)
    return loss


def update_balance_bias(bias: Array, load: Array, rate: float = 1e-3) -> Array:
    """The next ``balance_bias`` [E], once per step, from the load [E] summed over all ranks.

    It is state, not a parameter: keep it away from the optimizer. The result has the dtype of
    ``bias``. Without any load it stays as it is.
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


def _load(where: str, load: Array, experts: int) -> Array:
    """Counts of rows, as float32: exact up to 2**24, and the shares of larger ones are too."""
    counts = arguments.array(where, "load", load, (experts,), jnp.number)
    return counts.astype(jnp.float32)
