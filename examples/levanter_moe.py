# SPDX-License-Identifier: Apache-2.0
"""Levanter's ``moe_mlp`` of the Grug models (marin-levanter 0.2.227), with ``jax_smfree.nn``.

Their router stays as it is: the choice and the weights come from outside.
tests/clients/test_levanter.py compares this with their function.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_smfree import nn


def moe_mlp(
    token: Any,
    x: Array,  # [T, H]
    selected_experts: Array,  # [T, K]
    combine_weights: Array,  # [T, K]
    w_up_gate: Array,  # [E / R, H, 2 F]
    w_down: Array,  # [E / R, F, H]
    *,
    token_valid: Array | None = None,  # [T]
) -> tuple[Any, Array]:
    """On each rank, inside ``jax.shard_map``: the token, and [T, H]."""
    gate, up = jnp.split(w_up_gate, 2, axis=2)
    experts = nn.MlpParams(gate=gate, up=up, down=w_down)
    nothing = jnp.zeros((x.shape[0], token.group.config.num_experts))  # their losses are elsewhere
    routes = nn.Routes(
        topk_idx=selected_experts.astype(jnp.int32),
        topk_weights=combine_weights.astype(jnp.float32),
        probabilities=nothing,
        logits=nothing,
    )
    params = nn.MoeParams(router=None, experts=experts)
    return nn.moe_layer(token, params, x, routes=routes, mask=token_valid)[:2]
