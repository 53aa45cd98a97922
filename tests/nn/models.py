# SPDX-License-Identifier: Apache-2.0
"""The MoE layers of some models, each as arguments of `nn.moe_layer` and as a plain loop."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_smfree import nn

EXPERTS, HIDDEN, WIDTH = 8, 16, 24


@dataclasses.dataclass(frozen=True)
class Model:
    """``activation`` is a formula of its own, after the modules of transformers."""

    router: nn.RouterConfig
    activation: Callable[..., Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    params: dict[str, Any] = dataclasses.field(default_factory=dict)  # of init_moe
    balanced: bool = False


def silu(v: Any) -> Any:
    return v / (1 + jnp.exp(-v))


def of_gpt_oss(gate: Any, up: Any) -> Any:
    gate, up = jnp.minimum(gate, 0.5), jnp.clip(up, -0.5, 0.5)
    return (up + 1) * gate / (1 + jnp.exp(-1.702 * gate))


def experts(activation: Callable[..., Any]) -> dict[str, Any]:
    """Routed and shared ones."""
    return {
        "experts": functools.partial(nn.grouped_mlp, activation=activation),
        "shared": functools.partial(nn.mlp, activation=activation),
    }


MODELS = {
    "qwen2_moe": Model(
        nn.RouterConfig(2, normalise=False),
        lambda gate, up: silu(gate) * up,
        {"shared": nn.sigmoid_gated_mlp},
        {"shared_width": WIDTH, "shared_gate": True},
    ),
    "deepseek_v3": Model(
        nn.RouterConfig(
            2, score="sigmoid", scale=2.5, num_groups=4, groups_kept=2, group_score="top2"
        ),
        lambda gate, up: silu(gate) * up,
        {},
        {"shared_width": WIDTH},
        balanced=True,
    ),
    "gpt_oss": Model(
        nn.RouterConfig(2, softmax="after"),
        of_gpt_oss,
        experts(functools.partial(nn.clamped_swiglu, limit=0.5)),
        {"biases": True},
    ),
    "llama4": Model(
        nn.RouterConfig(1, score="sigmoid", normalise=False),
        lambda gate, up: silu(gate) * up,
        {"weight_on": "input"},
        {"shared_width": WIDTH},
    ),
    "nemotron_h": Model(
        nn.RouterConfig(2, score="sigmoid"),
        lambda up: jnp.where(up > 0, up**2, 0),
        experts(nn.relu_squared),
        {"gated": False, "shared_width": WIDTH, "biases": True},
    ),
    "gemma": Model(
        nn.RouterConfig(2),
        lambda gate, up: (
            0.5 * gate * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
        ),
        experts(nn.geglu),
    ),
}


def params_of(model: Model, seed: int = 0) -> nn.MoeParams:
    """Random ones, biases too; no program has to be compiled for them."""
    sizes = {"hidden": HIDDEN, "num_experts": EXPERTS, "expert_width": WIDTH}
    init = functools.partial(nn.init_moe, **sizes, **model.params)
    rng = np.random.default_rng(seed)

    def values(leaf: Any) -> Any:
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.5
        return jnp.asarray(rng.standard_normal(leaf.shape) * scale, leaf.dtype)

    return jax.tree.map(values, jax.eval_shape(init, jax.random.key(0)))


def rows(*shape: int, seed: int = 1) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal((*shape, HIDDEN))
    return jnp.asarray(values, jnp.float32)


def gradients(layer: Any, params: Any, x: Any) -> Any:
    """Of a loss that is not symmetric in anything, and what ``layer`` returned."""

    def loss(params: Any, x: Any) -> Any:
        out, rest = layer(params, x)
        return jnp.sum(jnp.sin(out) * (jnp.arange(out.size).reshape(out.shape) % 7)), (out, rest)

    of, (out, rest) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return (out, of), rest


def one_mlp(model: Model, params: Any, x: Any) -> Any:
    def linear(x: Any, w: Any, bias: Any) -> Any:
        return x @ w if bias is None else x @ w + bias

    up = linear(x, params.up, params.up_bias)
    if params.gate is None:
        hidden = model.activation(up)
    else:
        hidden = model.activation(linear(x, params.gate, params.gate_bias), up)
    return linear(hidden, params.down, params.down_bias)


def by_loop(
    model: Model, params: nn.MoeParams, x: Any, bias: Any = None, routes: Any = None
) -> Any:
    """``x`` [T, H] through one expert after the other; ``(out, load)``."""
    if routes is None:
        routes = nn.route(
            x, params.router, model.router, bias=params.router_bias, balance_bias=bias
        )
    weigh_input = model.options.get("weight_on") == "input"
    out = jnp.zeros_like(x)
    for e in range(EXPERTS):
        chosen = routes.topk_idx == e
        weight = jnp.sum(jnp.where(chosen, routes.topk_weights, 0), axis=1)[:, None]
        expert = jax.tree.map(lambda leaf, e=e: leaf[e], params.experts)
        y = one_mlp(model, expert, x * weight if weigh_input else x)
        y = y if weigh_input else y * weight
        out = out + jnp.where(chosen.any(axis=1)[:, None], y, 0)
    if isinstance(params.shared, nn.SigmoidGatedParams):
        gate = 1 / (1 + jnp.exp(-x @ params.shared.gate))
        out = out + gate[:, None] * one_mlp(model, params.shared.mlp, x)
    elif params.shared is not None:
        out = out + one_mlp(model, params.shared, x)
    return out, nn.expert_load(routes.topk_idx, EXPERTS)


@jax.custom_vjp
def poisoned_matmul(x: Any, w: Any, group_sizes: Any) -> Any:
    """A grouped matmul that leaves NaN wherever it may, forward and backward."""
    in_a_group = (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
    out = jax.lax.ragged_dot(jnp.where(in_a_group, x, 0), w, group_sizes)
    return jnp.where(in_a_group, out, jnp.nan)


def _forward(x: Any, w: Any, group_sizes: Any) -> Any:
    return poisoned_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(residuals: Any, dy: Any) -> Any:
    x, w, group_sizes = residuals
    in_a_group = (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
    x = jnp.where(in_a_group, x, 0)
    _, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, group_sizes), x, w)
    dx, dw = pull(jnp.where(in_a_group, dy, 0))
    return jnp.where(in_a_group, dx, jnp.nan), dw, None


poisoned_matmul.defvjp(_forward, _backward)
