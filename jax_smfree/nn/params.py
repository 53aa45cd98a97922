# SPDX-License-Identifier: Apache-2.0
"""Parameters of a mixture-of-experts layer: plain dataclasses of arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jax_smfree._src import arguments, group_axis


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
    """Normal weights with variance 1 / fan-in.

    Args:
      key: a PRNG key.
      hidden: H.
      width: F.
      leading: axes before the others, as [E] for one MLP per expert.
      dtype: of the weights, floating-point.

    Raises:
      ValueError, TypeError: for a value outside of what is said above.

    Example:
      >>> nn.init_swiglu(jax.random.key(0), hidden=16, width=32, dtype="float32").down.shape
      (32, 16)
    """
    check_key("init_swiglu", key)
    hidden = arguments.integer("init_swiglu", "hidden", hidden)
    width = arguments.integer("init_swiglu", "width", width)
    if not isinstance(leading, Sequence) or isinstance(leading, str | bytes):
        raise TypeError(
            f"init_swiglu: got leading={arguments.shown(leading)}, expected a tuple of sizes."
        )
    leading = tuple(arguments.integer("init_swiglu", "leading", size) for size in leading)
    dtype = _float_dtype("init_swiglu", dtype)
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

    Raises:
      ValueError, TypeError: for a value outside of what is said above.

    Example:
      >>> params = nn.init_moe(jax.random.key(0), hidden=16, num_experts=8, expert_width=32)
      >>> params.router.shape, params.experts.down.shape
      ((16, 8), (8, 32, 16))
    """
    check_key("init_moe", key)
    hidden = arguments.integer("init_moe", "hidden", hidden)
    num_experts = arguments.integer("init_moe", "num_experts", num_experts)
    expert_width = arguments.integer("init_moe", "expert_width", expert_width)
    shared_width = arguments.integer("init_moe", "shared_width", shared_width, least=0)
    dtype = _float_dtype("init_moe", dtype)
    router_key, experts_key, shared_key = jax.random.split(key, 3)
    return MoeParams(
        router=_init(router_key, (hidden, num_experts), jnp.float32),
        experts=init_swiglu(experts_key, hidden, expert_width, leading=(num_experts,), dtype=dtype),
        shared=init_swiglu(shared_key, hidden, shared_width, dtype=dtype) if shared_width else None,
    )


def moe_specs(params: MoeParams, axis: group_axis.Axis) -> MoeParams:
    """The ``PartitionSpec`` of every parameter: experts over ``axis``, the rest replicated.

    ``axis`` is that of the group: a name or a tuple of them.

    Raises:
      ValueError, TypeError: for what is no `MoeParams`, or names no axes.

    Example:
      >>> specs = nn.moe_specs(params, "ep")
      >>> specs.router == P(), specs.experts.gate == P("ep")
      (True, True)
    """
    arguments.instance("moe_specs", "params", params, MoeParams, "Make it with nn.init_moe.")
    axis = group_axis.checked("moe_specs", axis)
    replicated, split = PartitionSpec(), PartitionSpec(axis)
    specs: MoeParams = jax.tree.map(lambda _: replicated, params)
    return dataclasses.replace(specs, experts=jax.tree.map(lambda _: split, params.experts))


def _init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    fan_in = shape[-2]
    weights: Array = jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5
    return weights.astype(dtype)


def _float_dtype(where: str, value: DTypeLike) -> np.dtype[Any]:
    dtype = arguments.dtype(where, "dtype", value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{where}: got dtype={dtype}, expected one of floating-point numbers.")
    return dtype


def check_key(where: str, key: Array) -> None:
    """A key of ``jax.random.key``, or one of ``jax.random.PRNGKey``."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        is_key = shape == ()
    else:
        is_key = dtype == jnp.uint32 and len(shape or ()) == 1
    if not is_key:
        raise TypeError(
            f"{where}: got {arguments.shown(key)} as key, expected one PRNG key: "
            "jax.random.key(seed)."
        )
