# SPDX-License-Identifier: Apache-2.0
"""Rows in 8 bits: how they are quantised on the wire, and what is kept of them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_smfree import _native
from jax_smfree._src import arguments

_DTYPES = tuple(np.dtype(d) for d in (jnp.float8_e4m3fn, jnp.float8_e5m2))
_BLOCKS = (32, 64, 128)
QUANTISED = tuple(np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16))
"""The dtypes of the leaves that are quantised; others travel as they are."""


@dataclasses.dataclass(frozen=True)
class Fp8:
    """How rows of float32, bfloat16 or float16 travel: in 8 bits, with a scale for each block.

    Each block of ``block`` elements of a row is quantised while it is packed: with ``m`` its
    largest magnitude, and at least 1e-30, the scale is ``m / most``, ``most`` the largest value of
    ``dtype``, and the values are ``x / scale``, rounded to nearest even. A block with an element
    that is not finite is NaN. What arrives is ``value * scale``, in float32, rounded to the dtype
    of the row. A row takes ``1 + 4 / block`` bytes for each element on the wire.

    Attributes:
      block: elements that share a scale: 32, 64 or 128. The width of a row is a multiple of it.
      dtype: type of the values: float8_e4m3fn (3 bits of mantissa) or float8_e5m2 (2, and a wider
        range within a block).
      power_of_two: whether a scale is rounded up to a power of two, as MXFP8 has it.

    Raises:
      ValueError, TypeError: for a value outside of what is said above.

    Example:
      >>> smfree.Fp8(block=32, power_of_two=True)
      Fp8(block=32, dtype=dtype(float8_e4m3fn), power_of_two=True)
    """

    block: int = 128
    dtype: Any = jnp.float8_e4m3fn
    power_of_two: bool = False

    def __post_init__(self) -> None:
        block = arguments.integer("Fp8", "block", self.block)
        if block not in _BLOCKS:
            raise ValueError(f"Fp8: got block={block}, expected 32, 64 or 128 elements.")
        dtype = arguments.dtype("Fp8", "dtype", self.dtype)
        if dtype not in _DTYPES:
            raise TypeError(
                f"Fp8: got dtype={dtype}, expected {' or '.join(d.name for d in _DTYPES)}."
            )
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(
            self, "power_of_two", arguments.flag("Fp8", "power_of_two", self.power_of_two)
        )

    @property
    def bits(self) -> int:
        """Of exponent and mantissa: 43 or 52, as the custom calls have it."""
        return 43 if self.dtype == _DTYPES[0] else 52

    @property
    def most(self) -> float:
        """The largest value."""
        return 448.0 if self.dtype == _DTYPES[0] else 57344.0


class Quantized(NamedTuple):
    """Rows as they travelled, for a matmul in 8 bits: element i is ``values * scales[i // block]``.

    Attributes:
      values: [N, ...], in the dtype of the `Fp8`, of the shape of what was sent.
      scales: [N, W / block] float32, where W is the elements of a row.
    """

    values: Array
    scales: Array


def as_stored(rows: Array) -> Array:
    """``rows`` as an operation reads or writes them in memory, rounded to their dtype.

    XLA for GPUs takes a rounding away where it meets the way back to float32. The transpose is the
    same: cotangents are stored, too.
    """
    stored: Array = jax.lax.optimization_barrier(rows)
    return stored


def quantise(rows: Array, wire: Fp8) -> Quantized:
    """``rows`` [..., W] as values [..., W] and scales [..., W / block]."""
    blocks = rows.astype(jnp.float32).reshape(*rows.shape[:-1], -1, wire.block)
    magnitude = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), jnp.float32(_native.LEAST_MAGNITUDE))
    scales = magnitude * (np.float32(1) / np.float32(wire.most))
    if wire.power_of_two:
        scales = _power_of_two_from(scales)
    scales = jnp.where(jnp.isfinite(magnitude), scales, jnp.nan)
    values = as_stored((blocks * (1 / scales)[..., None]).astype(wire.dtype))
    return Quantized(values.reshape(rows.shape), scales)


def dequantise(quantised: Quantized) -> Array:
    """The rows in float32."""
    values, scales = quantised
    blocks = values.astype(jnp.float32).reshape(*scales.shape, -1)
    # Compilers may fuse this product with a sum that comes after it, and round once less.
    rows: Array = jax.lax.optimization_barrier(blocks * scales[..., None])
    return rows.reshape(values.shape)


def _power_of_two_from(scales: Array) -> Array:
    """The least power of two that is not less; ``scales`` are normal numbers."""
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    exponent = (bits >> 23) + (bits & 0x7FFFFF != 0).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
