# SPDX-License-Identifier: Apache-2.0
"""MaxText's ``RoutedMoE`` (version 0.2.5), written with ``jax_smfree.nn``.

`routed_moe` takes MaxText's configuration and the parameters of a block, and returns what
``nn.moe_layer`` takes. It only renames, so it converts gradients too;
tests/clients/test_maxtext.py compares outputs and gradients with MaxText's own dense path.
"""

import functools
from collections.abc import Mapping
from typing import Any

from jax_smfree import nn


def routed_moe(config: Any, arrays: Mapping[str, Any]) -> tuple[nn.MoeParams, dict[str, Any]]:
    """Of Mixtral, Qwen3-MoE, gpt-oss and DeepSeek-V3, by ``config.decoder_block``."""
    block, bias = config.decoder_block.value, arrays["gate"].get("bias")
    experts = nn.MlpParams(
        gate=arrays["wi_0"],
        up=arrays["wi_1"],
        down=arrays["wo"],
        gate_bias=arrays.get("wi_0_bias"),
        up_bias=arrays.get("wi_1_bias"),
        down_bias=arrays.get("wo_bias"),
    )
    router = nn.RouterConfig(config.num_experts_per_tok, softmax="after")
    options: dict[str, Any] = {"router": router}
    if block == "deepseek":
        groups = max(config.n_routing_groups, 1)  # -1: no groups
        options["router"] = nn.RouterConfig(
            config.num_experts_per_tok,
            score="sigmoid",
            scale=config.routed_scaling_factor,
            num_groups=groups,
            groups_kept=config.topk_routing_group if groups > 1 else 1,
            group_score="top2",
        )
        options["balance_bias"], bias = bias, None
    elif block == "gpt_oss":
        activation = functools.partial(nn.clamped_swiglu, limit=config.mlp_activations_limit)
        options["experts"] = functools.partial(nn.grouped_mlp, activation=activation)
    params = nn.MoeParams(router=arrays["gate"]["kernel"], experts=experts, router_bias=bias)
    return params, options
