# SPDX-License-Identifier: Apache-2.0
"""A byte-level transformer whose feed-forward layers are mixtures of experts.

Everything here runs inside ``jax.shard_map`` over one axis, ``ep``, which is data parallel for the
sequences and expert parallel for the experts: B sequences per rank, S bytes each, H hidden,
E experts over all ranks. The token threads through the layers in the carry of a scan.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jax_smfree import nn

AXIS = "ep"
VOCABULARY = 256  # the values of a byte
EXPERT_ALIGNMENT = 64  # rows in a block of the grouped matmul


ROUTERS = {
    "softmax": nn.RouterConfig(top_k=2),
    "deepseek-v3": nn.RouterConfig(
        top_k=2, score="sigmoid", scale=2.5, num_groups=4, groups_kept=2, group_score="top2"
    ),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    layers: int = 3
    hidden: int = 128
    heads: int = 4
    context: int = 128  # S
    experts: int = 8
    router: nn.RouterConfig = ROUTERS["softmax"]
    expert_width: int = 128
    shared_width: int = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerParams:
    attention_norm: Array  # [H]
    qkv: Array  # [H, 3 H]
    project: Array  # [H, H]
    moe_norm: Array  # [H]
    moe: nn.MoeParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    embed: Array  # [256, H], also the output matrix
    positions: Array  # [S, H]
    layers: LayerParams  # with a leading layer axis
    norm: Array  # [H]


def init(key: Array, config: ModelConfig) -> Params:
    """Global parameters; `specs` says how to shard them."""
    embed_key, positions_key, layers_key = jax.random.split(key, 3)
    hidden = config.hidden

    def init_layer(key: Array) -> LayerParams:
        qkv_key, project_key, moe_key = jax.random.split(key, 3)
        return LayerParams(
            attention_norm=jnp.ones(hidden),
            qkv=jax.random.normal(qkv_key, (hidden, 3 * hidden)) * hidden**-0.5,
            project=jax.random.normal(project_key, (hidden, hidden)) * hidden**-0.5,
            moe_norm=jnp.ones(hidden),
            moe=nn.init_moe(
                moe_key,
                hidden=hidden,
                num_experts=config.experts,
                expert_width=config.expert_width,
                shared_width=config.shared_width,
            ),
        )

    return Params(
        embed=jax.random.normal(embed_key, (VOCABULARY, hidden)) * hidden**-0.5,
        positions=jax.random.normal(positions_key, (config.context, hidden)) * hidden**-0.5,
        layers=jax.vmap(init_layer)(jax.random.split(layers_key, config.layers)),
        norm=jnp.ones(hidden),
    )


def specs(params: Params) -> Params:
    """Experts are split over the ranks (behind the layer axis), all else is replicated."""
    replicated: Params = jax.tree.map(lambda _: P(), params)
    moe = nn.moe_specs(params.layers.moe, AXIS)
    return dataclasses.replace(replicated, layers=dataclasses.replace(replicated.layers, moe=moe))


def forward(
    token: Any,
    params: Params,
    balance_bias: Array,
    text: Array,
    *,
    config: ModelConfig,
    implementation: nn.Implementation,
) -> tuple[Any, Array, nn.MoeAux]:
    """Logits of the next byte.

    Shapes: ``balance_bias`` [layers, E], ``text`` int32 [B, S] -> logits [B, S, 256] and a
    `MoeAux` with a leading layer axis.
    """
    moe = functools.partial(
        nn.moe_layer,
        router=config.router,
        grouped_matmul=functools.partial(nn.block_matmul, block_rows=EXPERT_ALIGNMENT),
        implementation=implementation,
    )

    branch_scale = (2 * config.layers) ** -0.5  # keeps the sum of all branches of order 1

    def layer(carry: Any, scanned: Any) -> Any:
        token, h = carry
        params, bias = scanned
        x = _mix_with_previous(_norm(h, params.attention_norm))
        h = h + branch_scale * _attention(params, x, config.heads)
        rows = _norm(h, params.moe_norm).reshape(-1, config.hidden)
        token, out, aux = moe(token, params.moe, rows, balance_bias=bias)
        return (token, h + branch_scale * out.reshape(h.shape)), aux

    h = params.embed[text] + params.positions[: text.shape[1]]
    (token, h), aux = jax.lax.scan(layer, (token, h), (params.layers, balance_bias))
    return token, _norm(h, params.norm) @ params.embed.T, aux


def loss(logits: Array, next_bytes: Array) -> Array:
    """Mean negative log likelihood, in nats per byte: [B, S, 256], [B, S] -> []."""
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, next_bytes[..., None], axis=-1))


def _norm(x: Array, scale: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _mix_with_previous(x: Array) -> Array:
    """Takes half of the channels from the position before, so that short contexts come for free."""
    kept, moved = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([kept, jnp.pad(moved, ((0, 0), (1, 0), (0, 0)))[:, :-1]], axis=-1)


def _attention(params: LayerParams, x: Array, heads: int) -> Array:
    shape = (*x.shape[:2], heads, x.shape[2] // heads)
    q, k, v = (part.reshape(shape) for part in jnp.split(x @ params.qkv, 3, axis=-1))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return attended.reshape(x.shape) @ params.project
