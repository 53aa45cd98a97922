# SPDX-License-Identifier: Apache-2.0
"""What programs know of a group."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from jax_smfree._src.config import EpConfig

if TYPE_CHECKING:
    from jax_smfree._src.group import EpGroup


@dataclasses.dataclass(frozen=True, eq=False)
class GroupKey:
    """Stands for an `EpGroup` in the structure of tokens and in the parameters of primitives.

    JAX keeps both in its caches, for as long as the process lives. So they hold this key, which is
    light, and not the group, which holds memory and sockets. Hashed by identity: one per group.

    Attributes:
      mesh, axis, config, num_ranks, group_id: the group's.
      group: the group itself, as long as somebody holds it.
    """

    mesh: Mesh
    axis: str
    config: EpConfig
    num_ranks: int
    group_id: int
    group: weakref.ref[EpGroup]

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The axes of the mesh: what a rank sends and receives varies over all of them."""
        return tuple(self.mesh.axis_names)

    def relay_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """The shape of ``Handle.relay`` for ``num_tokens`` rows per rank.

        It has an element in direct mode too: an array without one that enters a ``shard_map``
        crashes the compiler of jax 0.11.
        """
        if self.config.mode == "direct":
            return (1, 1, 1)
        per_node = self.config.ranks_per_node or self.num_ranks
        return (self.num_ranks // per_node, num_tokens, min(self.config.top_k, per_node))

    def __copy__(self) -> GroupKey:
        return self

    def __deepcopy__(self, memo: Any) -> GroupKey:
        return self
