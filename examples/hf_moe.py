# SPDX-License-Identifier: Apache-2.0
"""The MoE blocks of Hugging Face ``transformers`` (version 5), written with ``jax_smfree.nn``.

One function per family of models. It takes the model's configuration and the arrays of one block by
their names in its ``state_dict`` (`arrays_of`), and returns what ``nn.moe_layer`` takes: the
parameters, and the arguments by name::

    params, options = hf_moe.FAMILIES[config.model_type](config, hf_moe.arrays_of(block))
    token, out, aux = nn.moe_layer(token, params, x, **options)

The functions only split, transpose and rename. So they are linear, and they also convert gradients;
tests/clients/test_transformers.py compares outputs and all gradients with the blocks themselves.

Sizes: H hidden, E experts, F width of an expert.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_smfree import nn

Arrays = Mapping[str, Array]  # of one block, by their names in its state_dict
Layer = tuple[nn.MoeParams, dict[str, Any]]  # params and keyword arguments of nn.moe_layer


def arrays_of(block: Any) -> dict[str, Array]:
    """The parameters and buffers of a ``torch.nn.Module`` as float32 arrays."""
    return {name: jnp.array(w.float().numpy(force=True)) for name, w in block.state_dict().items()}


def fused_mlps(arrays: Arrays) -> nn.MlpParams:
    """Of experts that keep gate and up in one array [E, 2 F, H], as torch's Linear transposed."""
    gate, up = jnp.split(arrays["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
    return nn.MlpParams(gate=gate, up=up, down=arrays["experts.down_proj"].swapaxes(1, 2))


def mlp(arrays: Arrays, name: str) -> nn.MlpParams:
    """Of the shared expert of that name, three of torch's Linears."""
    gate, up, down = (arrays[f"{name}.{part}_proj.weight"].T for part in ("gate", "up", "down"))
    return nn.MlpParams(gate=gate, up=up, down=down)


def mixtral(config: Any, arrays: Arrays) -> Layer:
    params = nn.MoeParams(router=arrays["gate.weight"].T, experts=fused_mlps(arrays))
    return params, {"router": nn.RouterConfig(config.num_experts_per_tok)}


def qwen3_moe(config: Any, arrays: Arrays) -> Layer:
    """OLMoE is the same."""
    params = nn.MoeParams(router=arrays["gate.weight"].T, experts=fused_mlps(arrays))
    router = nn.RouterConfig(config.num_experts_per_tok, normalise=config.norm_topk_prob)
    return params, {"router": router}


def qwen2_moe(config: Any, arrays: Arrays) -> Layer:
    gate = arrays["shared_expert_gate.weight"][0]
    shared = nn.SigmoidGatedParams(gate=gate, mlp=mlp(arrays, "shared_expert"))
    params = nn.MoeParams(arrays["gate.weight"].T, fused_mlps(arrays), shared)
    router = nn.RouterConfig(config.num_experts_per_tok, normalise=config.norm_topk_prob)
    return params, {"router": router, "shared": nn.sigmoid_gated_mlp}


def deepseek_v3(config: Any, arrays: Arrays) -> Layer:
    """GLM-4.5 is the same."""
    params = nn.MoeParams(
        router=arrays["gate.weight"].T,
        experts=fused_mlps(arrays),
        shared=mlp(arrays, "shared_experts"),
    )
    router = nn.RouterConfig(
        config.num_experts_per_tok,
        score="sigmoid",
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        num_groups=config.n_group,
        groups_kept=config.topk_group,
        group_score="top2",
    )
    return params, {"router": router, "balance_bias": arrays["gate.e_score_correction_bias"]}


def gpt_oss(config: Any, arrays: Arrays) -> Layer:
    """Gate and up take turns in one array [E, H, 2 F], and everything has a bias."""
    gate_up, gate_up_bias = arrays["experts.gate_up_proj"], arrays["experts.gate_up_proj_bias"]
    experts = nn.MlpParams(
        gate=gate_up[..., ::2],
        up=gate_up[..., 1::2],
        down=arrays["experts.down_proj"],
        gate_bias=gate_up_bias[..., ::2],
        up_bias=gate_up_bias[..., 1::2],
        down_bias=arrays["experts.down_proj_bias"],
    )
    params = nn.MoeParams(
        router=arrays["router.weight"].T, experts=experts, router_bias=arrays["router.bias"]
    )
    activation = functools.partial(
        nn.clamped_swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit
    )
    return params, {
        "router": nn.RouterConfig(config.num_experts_per_tok, softmax="after"),
        "experts": functools.partial(nn.grouped_mlp, activation=activation),
    }


def llama4(config: Any, arrays: Arrays) -> Layer:
    """The weight multiplies what an expert gets; gate and up stand side by side, [E, H, 2 F]."""
    gate, up = jnp.split(arrays["experts.gate_up_proj"], 2, axis=2)
    params = nn.MoeParams(
        router=arrays["router.weight"].T,
        experts=nn.MlpParams(gate=gate, up=up, down=arrays["experts.down_proj"]),
        shared=mlp(arrays, "shared_expert"),
    )
    router = nn.RouterConfig(config.num_experts_per_tok, score="sigmoid", normalise=False)
    return params, {"router": router, "weight_on": "input"}


FAMILIES: dict[str, Callable[[Any, Arrays], Layer]] = {  # by the model_type of the configuration
    "deepseek_v3": deepseek_v3,
    "glm4_moe": deepseek_v3,
    "gpt_oss": gpt_oss,
    "llama4_text": llama4,
    "mixtral": mixtral,
    "olmoe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
}
