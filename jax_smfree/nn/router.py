# SPDX-License-Identifier: Apache-2.0
"""Which experts a row visits, and two ways to keep the experts equally busy.

* An auxiliary loss that is smallest when all experts get the same share: `load_balancing_loss`.
  Lepikhin et al., "GShard", 2020 (arXiv:2006.16668); in this form Fedus et al., "Switch
  Transformers", 2021 (arXiv:2101.03961), equations 4 to 6.
* Without a loss: a bias per expert that counts in the choice of experts only, and that a fixed
  small step lowers for a busy expert and raises for an idle one: `update_balance_bias`.
  Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024 (arXiv:2408.15664); DeepSeek-AI,
  "DeepSeek-V3", 2024 (arXiv:2412.19437), section 2.1.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Routes(NamedTuple):
    """The router's decision for T rows, the operands of ``dispatch_send``."""

    topk_idx: Array  # int32 [T, K], by falling score
    topk_weights: Array  # float32 [T, K], positive, each row sums to 1
    probabilities: Array  # float32 [T, E]


def route(x: Array, router: Array, top_k: int, *, balance_bias: Array | None = None) -> Routes:
    """Top-k of a softmax, in float32.

    Shapes: ``x`` [T, H], ``router`` [H, E], ``balance_bias`` [E].
    Differentiation: reaches ``x`` and ``router`` through the weights, which are the probabilities
    of the chosen experts divided by their sum. The choice itself and ``balance_bias`` get none.
    """
    logits = jnp.matmul(x.astype(jnp.float32), router, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    scores = probabilities if balance_bias is None else probabilities + balance_bias
    _, topk_idx = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)
    chosen = jnp.take_along_axis(probabilities, topk_idx, axis=-1)
    weights = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    return Routes(topk_idx.astype(jnp.int32), weights, probabilities)


def expert_load(topk_idx: Array, num_experts: int) -> Array:
    """int32 [E]: how many rows of ``topk_idx`` [T, K] go to each expert."""
    return jnp.zeros(num_experts, jnp.int32).at[topk_idx.reshape(-1)].add(1, mode="drop")


def load_balancing_loss(probabilities: Array, load: Array) -> Array:
    """``E * sum_e(share of rows of e * mean probability of e)``: 1 if balanced, E at the worst.

    Shapes: ``probabilities`` [T, E], ``load`` [E] (from `expert_load`) -> []. It is the loss of
    this rank's rows; add a small multiple (0.01) of it to the training loss.
    Differentiation: through the probabilities.
    """
    share = load / jnp.sum(load)
    return load.size * jnp.sum(share * jnp.mean(probabilities, axis=0))


def update_balance_bias(bias: Array, load: Array, rate: float = 1e-3) -> Array:
    """The next ``balance_bias`` [E], once per step, from the load [E] summed over all ranks.

    It is state, not a parameter: keep it away from the optimizer.
    """
    return bias + rate * jnp.sign(jnp.mean(load) - load)
