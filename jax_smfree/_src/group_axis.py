# SPDX-License-Identifier: Apache-2.0
"""The mesh axes of a group: one, or several, over which its ranks are numbered row-major.

Over several axes the last one given runs fastest, as in ``PartitionSpec`` and in JAX's collectives;
in which order the mesh has them does not matter. So ``jax.lax.axis_index(axis)`` is the rank, and
an array that is split by ``PartitionSpec(axis)`` is split by rank.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from jax_smfree._src.shown import shown

Axis: TypeAlias = str | tuple[str, ...]
"""As the user names them: ``"ep"``, or ``("context", "expert")``."""


def names(axis: Axis) -> tuple[str, ...]:
    """The names in their order."""
    return (axis,) if isinstance(axis, str) else axis


def checked(where: str, axis: Any) -> Axis:
    """``axis`` names one axis or several.

    Raises:
      TypeError: for what is neither a string nor a tuple of strings.
      ValueError: for a tuple without a name, or with one twice.
    """
    given = axis if isinstance(axis, tuple) else (axis,)
    if not all(isinstance(name, str) for name in given):
        got = f"{axis!r}" if isinstance(axis, tuple) else shown(axis)
        raise TypeError(
            f"{where}: got {got} as axis, expected the name of a mesh axis, or a tuple of names."
        )
    if len(set(given)) < max(1, len(given)):
        raise ValueError(
            f"{where}: got axis={axis!r}, expected the name of a mesh axis, or a tuple with at "
            "least one name, and each of them once."
        )
    names_of_axes: Axis = axis
    return names_of_axes


def checked_on(where: str, axis: Any, mesh: Mesh) -> Axis:
    """`checked`, and the mesh has them all."""
    on_mesh = checked(where, axis)
    missing = [name for name in names(on_mesh) if name not in mesh.axis_names]
    if missing:
        expected = "one" if isinstance(axis, str) else f"without {missing}, some"
        raise ValueError(
            f"{where}: got axis={axis!r}, expected {expected} of the mesh's axes "
            f"{list(mesh.axis_names)}."
        )
    return on_mesh


def size(axis: Axis, mesh: Mesh) -> int:
    """How many ranks a group over ``axis`` has."""
    return math.prod(mesh.shape[name] for name in names(axis))


def replicas(axis: Axis, mesh: Mesh) -> list[list[jax.Device]]:
    """The devices of each group along ``axis``, by rank.

    The groups are numbered row-major over the further axes of the mesh, in its order.
    """
    positions = [mesh.axis_names.index(name) for name in names(axis)]
    last = np.moveaxis(mesh.devices, positions, range(-len(positions), 0))
    found: list[list[jax.Device]] = last.reshape(-1, size(axis, mesh)).tolist()
    return found
