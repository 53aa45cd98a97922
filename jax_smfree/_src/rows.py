# SPDX-License-Identifier: Apache-2.0
"""What the rows of an operation are: a pytree of arrays with the same number of rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_smfree import _native
from jax_smfree._src import fp8
from jax_smfree._src.fp8 import Fp8, Quantized

FLOATS = (*fp8.QUANTISED, np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2))
"""What is summed and differentiated."""
DTYPES = (
    *FLOATS,
    *(
        np.dtype(d)
        for d in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")
    ),
)


class Leaf(NamedTuple):
    """An array [*, width] of the rows of an operation."""

    width: int
    dtype: np.dtype[Any]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    def is_quantised(self, wire: Fp8 | None) -> bool:
        return wire is not None and self.dtype in fp8.QUANTISED

    def on_wire(self, wire: Fp8 | None) -> tuple[Leaf, ...]:
        """The leaf as it travels; quantised: values and scales."""
        if wire is None or not self.is_quantised(wire):
            return (self,)
        scales = Leaf(self.width // wire.block, np.dtype(np.float32))
        return (Leaf(self.width, np.dtype(wire.dtype)), scales)


def on_wire(leaves: Iterable[Leaf], wire: Fp8 | None) -> tuple[Leaf, ...]:
    return tuple(part for leaf in leaves for part in leaf.on_wire(wire))


def aligned(row_bytes: int) -> int:
    return -(-row_bytes // _native.ROW_ALIGNMENT) * _native.ROW_ALIGNMENT


def stride(leaves: Iterable[Leaf], wire: Fp8 | None) -> int:
    """Bytes of a row in a message; csrc/protocol/row_format.h has the layout."""
    return sum(aligned(width * dtype.itemsize) for width, dtype in on_wire(leaves, wire))


def lost(dtype: np.dtype[Any]) -> Any:
    """What stands in the place of what did not fit, where that is an error: all bits set."""
    return np.True_ if dtype.kind == "b" else np.full(dtype.itemsize, 255, np.uint8).view(dtype)[0]


def largest_stride(
    leaves: Iterable[Leaf], wire: Fp8 | None, grad_wire: Fp8 | None, keep: bool
) -> int:
    """The longest row of an operation and of its derivatives, in bytes of a message."""
    leaves = tuple(leaves)
    return max(stride(leaves, wire), stride(differentiable(leaves, keep), grad_wire))


def differentiable(leaves: Iterable[Leaf], keep: bool) -> tuple[Leaf, ...]:
    """The leaves that have a tangent; none if they are to be kept as they travelled."""
    return () if keep else tuple(leaf for leaf in leaves if leaf.is_float)


def local_expert(group_sizes: Array, shape: tuple[int, ...]) -> Array:
    """int32 of ``shape``, the first sizes of ``d.x``: the local expert of each row.

    E / R past the last group, or past each group in the padded layout.
    """
    if len(shape) == 2:
        experts, places = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1))
        return jnp.where(places < group_sizes[:, None], experts, jnp.int32(shape[0]))
    (num_rows,) = shape
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    ends_here = jnp.zeros(num_rows, jnp.int32).at[ends].add(jnp.int32(1), mode="drop")
    return jnp.cumsum(ends_here, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The static description of rows.

    Attributes:
      tree: the structure of the pytree.
      shapes, dtypes: of each of its arrays, without the leading number of rows.
    """

    tree: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype[Any], ...]

    @classmethod
    def of(cls, value: Any) -> Rows:
        """``value`` is a pytree of arrays."""
        arrays, tree = jax.tree.flatten(value)
        return cls(tree, tuple(a.shape[1:] for a in arrays), tuple(a.dtype for a in arrays))

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(Leaf(math.prod(s), d) for s, d in zip(self.shapes, self.dtypes, strict=True))

    def flat(self, value: Any) -> list[Array]:
        """The arrays of ``value`` as [*, width]."""
        return [a.reshape(a.shape[0], math.prod(a.shape[1:])) for a in jax.tree.leaves(value)]

    def restored(self, arrays: Sequence[Array], kept: Fp8 | None = None) -> Any:
        """What `flat` came from; with values and scales where quantised ``kept`` says so."""
        left = iter(arrays)

        def shaped(leaf: Leaf, shape: tuple[int, ...]) -> Any:
            first = next(left)
            first = first.reshape(first.shape[0], *shape)
            return Quantized(first, next(left)) if leaf.is_quantised(kept) else first

        return self.tree.unflatten(list(map(shaped, self.leaves, self.shapes)))
