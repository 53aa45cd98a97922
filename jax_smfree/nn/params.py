# SPDX-License-Identifier: Apache-2.0
"""Parameters of a mixture-of-experts layer: plain dataclasses of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SwigluParams:
    """``down(silu(gate(x)) * up(x))``; with a leading axis it is one such MLP per expert."""

    gate: Array  # [..., H, F]
    up: Array  # [..., H, F]
    down: Array  # [..., F, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeParams:
    """E experts of width F, of which a rank holds E / R inside ``shard_map``."""

    router: Array  # float32 [H, E], replicated
    experts: SwigluParams  # [E, H, F] and [E, F, H], split along the first axis
    shared: SwigluParams | None  # an MLP that every row visits, replicated


def init_swiglu(
    key: Array, hidden: int, width: int, *, leading: tuple[int, ...] = (), dtype: DTypeLike
) -> SwigluParams:
    """Normal weights with variance 1 / fan-in."""
    keys = jax.random.split(key, 3)
    return SwigluParams(
        gate=_init(keys[0], (*leading, hidden, width), dtype),
        up=_init(keys[1], (*leading, hidden, width), dtype),
        down=_init(keys[2], (*leading, width, hidden), dtype),
    )


def init_moe(
    key: Array,
    *,
    hidden: int,
    num_experts: int,
    expert_width: int,
    shared_width: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> MoeParams:
    """Global parameters of a layer, for all ranks; `moe_specs` says how to shard them.

    Args:
      key: a PRNG key.
      hidden: H.
      num_experts: E, over all ranks.
      expert_width: F of a routed expert.
      shared_width: F of the shared expert; 0 leaves it out.
      dtype: of the experts. The router is float32 always.
    """
    router_key, experts_key, shared_key = jax.random.split(key, 3)
    return MoeParams(
        router=_init(router_key, (hidden, num_experts), jnp.float32),
        experts=init_swiglu(experts_key, hidden, expert_width, leading=(num_experts,), dtype=dtype),
        shared=init_swiglu(shared_key, hidden, shared_width, dtype=dtype) if shared_width else None,
    )


def moe_specs(params: MoeParams, axis: str) -> MoeParams:
    """The ``PartitionSpec`` of every parameter: experts over ``axis``, the rest replicated."""
    replicated, split = PartitionSpec(), PartitionSpec(axis)
    specs: MoeParams = jax.tree.map(lambda _: replicated, params)
    return dataclasses.replace(specs, experts=jax.tree.map(lambda _: split, params.experts))


def _init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    fan_in = shape[-2]
    weights: Array = jax.random.normal(key, shape) * fan_in**-0.5
    return weights.astype(dtype)
