# SPDX-License-Identifier: Apache-2.0
"""Parameters of a mixture-of-experts layer: plain dataclasses of arrays."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jax_smfree._src import arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MlpParams:
    """``down(activation(gate(x), up(x)))``; with a leading axis it is one such MLP per expert.

    They may have any floating-point dtype. The layer casts them to the dtype of the rows, so a
    bfloat16 group may have float32 masters.
    """

    gate: Array | None  # [..., H, F]; None: down(activation(up(x)))
    up: Array  # [..., H, F]
    down: Array  # [..., F, H]
    gate_bias: Array | None = None  # [..., F]
    up_bias: Array | None = None  # [..., F]
    down_bias: Array | None = None  # [..., H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SigmoidGatedParams:
    """``sigmoid(x @ gate) * mlp(x)``, a shared expert with a gate."""

    gate: Array  # [H]
    mlp: MlpParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeParams:
    """E experts of width F, of which a rank holds E / R inside ``shard_map``."""

    router: Array | None  # float32 [H, E], replicated; None where routes come from outside
    experts: Any  # what the experts take: MlpParams, or any arrays [E, ...]; split along that axis
    shared: Any = None  # an expert that every row visits, or None; replicated
    router_bias: Array | None = None  # float32 [E], added to the logits


def init_mlp(
    key: Array,
    hidden: int,
    width: int,
    *,
    leading: tuple[int, ...] = (),
    gated: bool = True,
    biases: bool = False,
    dtype: DTypeLike,
) -> MlpParams:
    """Normal weights with variance 1 / fan-in, and biases that are zero.

    Args:
      key: a PRNG key.
      hidden: H.
      width: F.
      leading: axes before the others, as [E] for one MLP per expert.
      gated: whether there is a gate; not for ``relu_squared``.
      biases: whether every matmul has one.
      dtype: type of the weights, floating-point.

    Raises:
      ValueError, TypeError: for a value outside of what is said above.

    Example:
      >>> nn.init_mlp(jax.random.key(0), hidden=16, width=32, dtype="float32").down.shape
      (32, 16)
    """
    name = "init_mlp"
    check_key(name, key)
    hidden = arguments.integer(name, "hidden", hidden)
    width = arguments.integer(name, "width", width)
    if not isinstance(leading, Sequence) or isinstance(leading, str | bytes):
        raise TypeError(
            f"{name}: got leading={arguments.shown(leading)}, expected a tuple of sizes."
        )
    leading = tuple(arguments.integer(name, "leading", size) for size in leading)
    gated = arguments.flag(name, "gated", gated)
    biases = arguments.flag(name, "biases", biases)
    dtype = _float_dtype(name, dtype)
    keys = jax.random.split(key, 3)

    def bias(size: int) -> Array | None:
        return jnp.zeros((*leading, size), dtype) if biases else None

    return MlpParams(
        gate=_init(keys[0], (*leading, hidden, width), dtype) if gated else None,
        up=_init(keys[1], (*leading, hidden, width), dtype),
        down=_init(keys[2], (*leading, width, hidden), dtype),
        gate_bias=bias(width) if gated else None,
        up_bias=bias(width),
        down_bias=bias(hidden),
    )


def init_moe(
    key: Array,
    *,
    hidden: int,
    num_experts: int,
    expert_width: int,
    shared_width: int = 0,
    shared_gate: bool = False,
    gated: bool = True,
    biases: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> MoeParams:
    """Global parameters of a layer, for all ranks; `moe_specs` says how to shard them.

    Args:
      key: a PRNG key.
      hidden: H.
      num_experts: E, over all ranks.
      expert_width: F of a routed expert.
      shared_width: F of the shared expert; 0 leaves it out.
      shared_gate: whether the shared expert has a sigmoid gate: `SigmoidGatedParams`.
      gated: whether the experts have a gate, as ``swiglu`` needs; not for ``relu_squared``.
      biases: whether the router and all matmuls of the experts have biases, zero at first.
      dtype: type of the experts' parameters. The router is always float32.

    Raises:
      ValueError, TypeError: for a value outside of what is said above.

    Example:
      >>> params = nn.init_moe(jax.random.key(0), hidden=16, num_experts=8, expert_width=32)
      >>> params.router.shape, params.experts.down.shape
      ((16, 8), (8, 32, 16))
    """
    name = "init_moe"
    check_key(name, key)
    hidden = arguments.integer(name, "hidden", hidden)
    num_experts = arguments.integer(name, "num_experts", num_experts)
    expert_width = arguments.integer(name, "expert_width", expert_width)
    shared_width = arguments.integer(name, "shared_width", shared_width, least=0)
    shared_gate = arguments.flag(name, "shared_gate", shared_gate)
    biases = arguments.flag(name, "biases", biases)
    if shared_gate and not shared_width:
        raise ValueError(
            f"{name}: got shared_gate=True with shared_width=0, expected the width of the shared "
            "expert whose gate that is."
        )
    make = functools.partial(
        init_mlp,
        gated=arguments.flag(name, "gated", gated),
        biases=biases,
        dtype=_float_dtype(name, dtype),
    )
    router_key, experts_key, shared_key = jax.random.split(key, 3)
    shared: Any = make(shared_key, hidden, shared_width) if shared_width else None
    if shared_gate:
        gate_key = jax.random.fold_in(shared_key, 0)
        shared = SigmoidGatedParams(_init(gate_key, (hidden, 1), shared.up.dtype)[:, 0], shared)
    return MoeParams(
        router=_init(router_key, (hidden, num_experts), jnp.float32),
        experts=make(experts_key, hidden, expert_width, leading=(num_experts,)),
        shared=shared,
        router_bias=jnp.zeros(num_experts, jnp.float32) if biases else None,
    )


def check_mlp(
    where: str, name: str, params: MlpParams, leading: tuple[int, ...], hidden: int
) -> None:
    """``params`` are those of an MLP, or of several, of ``hidden``."""
    arguments.instance(where, name, params, MlpParams, "Make it with nn.init_mlp.")
    up = arguments.array(where, f"{name}.up", params.up, (*leading, hidden, "F"))
    width = up.shape[-1]
    arguments.array(where, f"{name}.down", params.down, (*leading, width, hidden))
    sizes = {"gate": (hidden, width), "gate_bias": (width,), "up_bias": (width,),
             "down_bias": (hidden,)}  # fmt: skip
    for field, shape in sizes.items():
        value = getattr(params, field)
        if value is not None:
            arguments.array(where, f"{name}.{field}", value, (*leading, *shape))


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
