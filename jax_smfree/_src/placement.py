# SPDX-License-Identifier: Apache-2.0
"""Where arrays are on a mesh whose axes may be explicit, as those of ``jax.make_mesh`` are."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def placed(value: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """``value``, typed as split by ``spec``, as far as the axes of ``mesh`` are explicit.

    Along an explicit axis a sharding is a part of an array's type, and JAX does not change it by
    itself. Along the other axes ``value`` stays as it is: there the compiler decides.
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def explicit(entry: Any) -> tuple[str, ...] | None:
        axes = entry if isinstance(entry, tuple) else (entry,)
        return tuple(a for a in axes if kinds.get(a) == AxisType.Explicit) or None

    if AxisType.Explicit not in kinds.values():
        return value
    kept = PartitionSpec(*(explicit(entry) for entry in spec))
    return jax.sharding.reshard(value, NamedSharding(mesh, kept))
