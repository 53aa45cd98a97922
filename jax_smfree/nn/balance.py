# SPDX-License-Identifier: Apache-2.0
"""What keeps the experts equally busy.

* An auxiliary loss that is smallest when all experts get the same share: `load_balancing_loss`.
  Lepikhin et al., "GShard", 2020 (arXiv:2006.16668); in this form Fedus et al., "Switch
  Transformers", 2021 (arXiv:2101.03961), equations 4 to 6.
* Without a loss: a bias per expert that counts in the choice of experts only, and that a fixed
  small step lowers for a busy expert and raises for an idle one: `update_balance_bias`.
  Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024 (arXiv:2408.15664); DeepSeek-AI,
  "DeepSeek-V3", 2024 (arXiv:2412.19437), section 2.1.2.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jax_smfree._src import arguments
from jax_smfree.nn.router import Routes


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


def load_balancing_loss(routes: Routes) -> Array:
    """``E * sum_e(share of rows of e * mean probability of e)``: 1 if balanced, E at the worst.

    Shapes: float32 []. It is the loss of this rank's rows, of those that go to an expert, and 0 if
    none does; add a small multiple (0.01) of it to the training loss.
    Differentiation: through the probabilities.

    Example:
      >>> routes = nn.route(x, params.router, nn.RouterConfig(top_k=2))
      >>> bool(nn.load_balancing_loss(routes) >= 1)
      True
    """
    name = "load_balancing_loss"
    topk_idx, probabilities = _checked(name, routes)
    experts = probabilities.shape[1]
    load = expert_load(topk_idx, experts).astype(jnp.float32)
    counted = (topk_idx >= 0).any(axis=1)
    rows = jnp.sum(counted, dtype=jnp.float32)
    share = load / jnp.maximum(jnp.sum(load), jnp.float32(1))
    total = jnp.sum(jnp.where(counted[:, None], probabilities, jnp.float32(0)), axis=0)
    loss: Array = experts * jnp.sum(share * total / jnp.maximum(rows, jnp.float32(1)))
    return loss


def update_balance_bias(bias: Array, load: Array, rate: float = 1e-3) -> Array:
    """The next ``balance_bias`` [E], once per step, from the load [E] summed over all ranks.

    It is state, not a parameter: keep it away from the optimizer. The result has the dtype of
    ``bias``. Without any load it stays as it is.

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


def _checked(where: str, routes: Routes) -> tuple[Array, Array]:
    """``topk_idx`` and ``probabilities``, of as many rows."""
    arguments.instance(where, "routes", routes, Routes, "It is what nn.route returns.")
    idx = arguments.array(where, "routes.topk_idx", routes.topk_idx, ("T", "K"), jnp.integer)
    shape = idx.shape[0], "E"
    probabilities = arguments.array(where, "routes.probabilities", routes.probabilities, shape)
    return idx, probabilities.astype(jnp.float32)


def _load(where: str, load: Array, experts: int) -> Array:
    """Counts of rows, as float32: exact up to 2**24, and the shares of larger ones are too."""
    counts = arguments.array(where, "load", load, (experts,), jnp.number)
    return counts.astype(jnp.float32)
