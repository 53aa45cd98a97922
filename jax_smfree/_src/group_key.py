# SPDX-License-Identifier: Apache-2.0
"""What programs know of a group."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from jax_smfree._src import compat, group_axis, portable, rows
from jax_smfree._src.config import EpConfig

if TYPE_CHECKING:
    from jax_smfree._src.backends import Backend
    from jax_smfree._src.group import EpGroup


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GroupKey:
    """Stands for an `EpGroup` in the structure of tokens and in the parameters of primitives.

    JAX keeps both in its caches, for as long as the process lives. So they hold this key, which is
    light, and not the group, which holds memory and sockets. Hashed by identity: one per group.

    Attributes:
      mesh, axis, config, num_ranks, group_id, backend: the group's.
      group: the group itself, as long as somebody holds it.
    """

    mesh: Mesh
    axis: group_axis.Axis
    config: EpConfig
    num_ranks: int
    group_id: int
    backend: Backend
    group: weakref.ref[EpGroup]

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The axes of the mesh: what a rank sends and receives varies over all of them."""
        return tuple(self.mesh.axis_names)

    @property
    def further_axes(self) -> tuple[str, ...]:
        """Those of the mesh that are not the group's: each coordinate is a group of its own."""
        own = group_axis.names(self.axis)
        return tuple(name for name in self.mesh_axes if name not in own)

    @property
    def row_bytes(self) -> int:
        """The most that a row takes in a message."""
        return rows.aligned(self.config.hidden * self.config.dtype.itemsize)

    def check_mesh(self, where: str) -> None:
        """The call ``where`` stands in a ``shard_map`` over the mesh, manual over all its axes."""
        manual, got, expected = compat.manual_axes(), compat.mesh_shape(), dict(self.mesh.shape)
        if manual and got != expected:
            further = [axis for axis in got if axis not in expected]
            why = f": rows must not cross the copies along {further}" if further else ""
            raise ValueError(
                f"{where}: got a shard_map over a mesh of {got}, expected the mesh of the group, "
                f"{expected}{why}. Make the group on the mesh of the shard_map, "
                "EpGroup.create(mesh, ...): each coordinate of the further axes then is a group "
                "of its own."
            )
        missing = [axis for axis in self.mesh_axes if axis not in manual]
        if missing:
            got_map = f"a shard_map over {sorted(manual)}" if manual else "no shard_map"
            raise ValueError(
                f"{where}: got {got_map}, expected one with the mesh axes {missing} manual. Call "
                f"it inside jax.shard_map(..., mesh=mesh) over all axes {list(self.mesh_axes)} of "
                "the group's mesh."
            )

    def check_devices(self, call_site: str, mesh: Mesh | None) -> None:
        """The devices that an operation is compiled for are the group's, each at its place.

        Which ones they are is known when a program is lowered, and not while it is traced.
        """
        if mesh is None:
            return
        order = [mesh.axis_names.index(axis) for axis in self.mesh_axes]
        got, expected = np.transpose(mesh.devices, order), self.mesh.devices
        if (got != expected).any():
            raise ValueError(
                f"jax_smfree: the operation at {call_site} is compiled for the devices "
                f"{[d.id for d in got.flat]} along the axes {list(self.mesh_axes)}, expected those "
                f"of its group in their order, {[d.id for d in expected.flat]}. Make the group on "
                "the mesh that the shard_map is over."
            )

    def message_floats(self, num_tokens: int, carries_slots: bool, row_bytes: int) -> int:
        """How many floats longer a token is in flight: only a portable group's carries anything."""
        if self.backend != "portable":
            return 0
        slot_width = self.config.top_k if carries_slots else 0
        return portable.message_floats(self.num_ranks, num_tokens, row_bytes, slot_width)

    def relay_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """The shape of ``Handle.relay`` for ``num_tokens`` rows per rank.

        It has an element in direct mode too: an array without one that enters a ``shard_map``
        crashes the compiler of jax 0.11.
        """
        if self.config.mode == "direct":
            return (1, 1, 1)
        per_node = self.config.ranks_per_node or self.num_ranks
        return (self.num_ranks // per_node, num_tokens, min(self.config.top_k, per_node))

    def __repr__(self) -> str:
        """Short, because JAX shows it, as a part of types that differ."""
        return f"EpGroup(axis={self.axis!r}, num_ranks={self.num_ranks}, id={self.group_id:#x})"

    def __copy__(self) -> GroupKey:
        return self

    def __deepcopy__(self, memo: Any) -> GroupKey:
        return self
