# SPDX-License-Identifier: Apache-2.0
"""Arrays [..., W] of any shape as rows [N, W] that divide over devices, and back."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_smfree._src.placement import placed
from jax_smfree.nn.specs import as_tuple


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of arrays [*shape, W], in their order, split over the axes in ``spec``."""

    mesh: Mesh
    spec: PartitionSpec
    shape: tuple[int, ...]

    @property
    def number(self) -> int:
        return math.prod(self.shape)

    @property
    def padded(self) -> int:
        """As many on every device, and not none."""
        (axes,) = map(as_tuple, self.spec)
        devices = math.prod(self.mesh.shape[axis] for axis in axes)
        return int(max(-(-self.number // devices), 1) * devices)

    def mask(self, mask: Array | None) -> Array | None:
        """``mask`` [*shape], or all rows, without those that only fill up."""
        if self.padded == self.number:
            return mask
        return jnp.ones(self.shape, bool) if mask is None else mask

    def flat(self, array: Array) -> Any:
        """[*shape, ...] -> [N, ...], filled up with zeros."""
        trailing = array.shape[len(self.shape) :]
        missing = [(0, self.padded - self.number)] + [(0, 0)] * len(trailing)

        def flatten(array: Array) -> Array:
            rows = array.reshape(self.number, *trailing)
            return jnp.pad(rows, missing) if self.padded > self.number else rows

        if array.shape == (self.padded, *trailing):
            return placed(array, self.mesh, self.spec)
        return self._by_compiler(flatten, array, self.spec)

    def as_given(self, rows: Array, given: Array) -> Any:
        """[N, W] -> [*shape, W], of the sharding of ``given``."""

        def unflatten(rows: Array) -> Array:
            return rows[: self.number].reshape(given.shape)

        spec = jax.typeof(given).sharding.spec
        if rows.shape == given.shape:
            return placed(rows, self.mesh, spec)
        return self._by_compiler(unflatten, rows, spec)

    def _by_compiler(
        self, function: Callable[[Array], Array], array: Array, spec: PartitionSpec
    ) -> Any:
        """``function(array)``; on explicit axes the compiler finds out how to come to ``spec``."""
        kinds = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        if not explicit:
            return function(array)
        sharding = NamedSharding(self.mesh, _of(spec, explicit))
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.sharding.auto_axes(function, axes=explicit, out_sharding=sharding)(array)


def _of(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """``spec`` with the names in ``axes`` alone."""
    named = (as_tuple(entry) for entry in spec)
    return PartitionSpec(*(tuple(n for n in names if n in axes) or None for names in named))
