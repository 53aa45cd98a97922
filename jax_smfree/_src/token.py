# SPDX-License-Identifier: Apache-2.0
"""The token and the results that are threaded through a program, all of them pytrees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
from jax.tree_util import GetAttrKey

from jax_smfree._src.errors import SmfreeError
from jax_smfree._src.fp8 import Fp8
from jax_smfree._src.group_key import GroupKey
from jax_smfree._src.rows import Rows, local_expert

if TYPE_CHECKING:
    from jax_smfree._src.group import EpGroup

# csrc/protocol/token.h: floats, because the cotangent of a token is a token, and float32 holds
# integers up to 2**24 exactly. The native handlers read and write it; Python only makes zeros.
TOKEN_SIZE = 9


@dataclasses.dataclass(frozen=True)
class InFlight:
    """The state of a token between a send and its recv.

    Attributes:
      operation: ``"dispatch"`` or ``"combine"``.
      call_site: where the send stands in the user's program.
      num_tokens: rows per rank of the operation.
      rows: what they are.
      wire, grad_wire: how they travel, and their derivatives.
      keep: whether the recv leaves them as they travelled.
      cached: whether the dispatch goes along a handle.
      carries_slots: whether a float goes along for each slot of a row.
    """

    operation: str
    call_site: str
    num_tokens: int
    rows: Rows
    wire: Fp8 | None
    grad_wire: Fp8 | None
    keep: bool
    cached: bool
    carries_slots: bool

    def __str__(self) -> str:
        return f"in flight: {self.operation}_send at {self.call_site}"


@dataclasses.dataclass(frozen=True, eq=False)
class Token:
    """Orders operations. Opaque: use it once, and go on with the one returned.

    A token holds its group; the structure of a token, which JAX keeps in its caches, does not.

    Attributes:
      array: float32[9] per rank, the only differentiable leaf; behind it the messages in flight of
        a portable group.
      routing: integer arrays that the recv of an operation in flight needs, or the handle.
      group: the `EpGroup` (static).
      lane: the lane (static).
      state: ``None`` when ready for a send, else an `InFlight` (static).
    """

    array: jax.Array
    routing: tuple[Any, ...]
    group: EpGroup
    lane: int
    state: InFlight | None


_Structure = tuple[GroupKey, int, InFlight | None]


def _children(token: Token) -> tuple[tuple[Any, Any], _Structure]:
    return (token.array, token.routing), (token.group.key, token.lane, token.state)


def _children_with_keys(token: Token) -> tuple[tuple[Any, Any], _Structure]:
    (array, routing), structure = _children(token)
    return ((GetAttrKey("array"), array), (GetAttrKey("routing"), routing)), structure


def _token(structure: _Structure, children: Iterable[Any]) -> Token:
    key, lane, state = structure
    group = key.group()
    if group is None:
        raise SmfreeError(
            "jax_smfree: the EpGroup of this token is gone: it was dropped without close(). Keep "
            "the group (it is a context manager) as long as programs use it."
        )
    array, routing = children
    return Token(array, routing, group, lane, state)


jax.tree_util.register_pytree_with_keys(Token, _children_with_keys, _token, _children)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "places",
        "send_counts",
        "rows",
        "recv_counts",
        "relay",
        "group_sizes",
        "num_rows",
        "num_dropped",
    ],
    meta_fields=["num_tokens", "group"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Handle:
    """The routing of one dispatch, all int32, per rank.

    Another dispatch may go along it (`dispatch_send`), and any number of combines.

    R ranks, E experts, T rows per rank, K = ``top_k``, B = ``EpConfig.num_wire_rows(T, R)``.

    Attributes:
      places: [T, min(K, R)], the places of a row on the wire, ascending:
        ``destination_rank * T + position`` among the rows to that rank; -1 fills the end.
      send_counts: [R], rows sent to each rank.
      rows: [B, K], the row of ``d.x`` of each slot of the rows received, those of rank 0 first,
        then of rank 1, …; -1 when the slot's expert is not here, or the copy was dropped, and past
        ``sum(recv_counts)``.
      recv_counts: [R], rows received from each rank and kept: the first B of those sent here.
      relay: [M, T, min(K, L)] in hierarchical mode with M nodes of L ranks, what this rank relays:
        the places in this node, ``index * T + position`` among the rows to that rank, of the i-th
        row that the rank of this index in node m has sent here; -1 fills the end. Else [1, 1, 1],
        -1. A portable group relays nothing: -1 everywhere.
      group_sizes: [E / R], rows of each local expert in ``d.x``, each a multiple of
        ``expert_alignment``.
      num_rows: [E / R], the same without the rows that fill a group up.
      num_dropped: [1], copies of rows that did not fit into ``wire_capacity`` or into ``d.x``.
      num_tokens: T (static).
      group: the key of the `EpGroup` (static).
    """

    places: jax.Array
    send_counts: jax.Array
    rows: jax.Array
    recv_counts: jax.Array
    relay: jax.Array
    group_sizes: jax.Array
    num_rows: jax.Array
    num_dropped: jax.Array
    num_tokens: int
    group: GroupKey


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["x", "weights", "handle"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False)
class DispatchResult:
    """What arrived at this rank, grouped by local expert: the operands of a grouped matmul.

    Every leaf has a leading dimension per rank, so the result leaves and enters a ``shard_map``
    with one spec for all of them, ``group.token_spec``.

    Attributes:
      x: what was sent, with N rows in the place of T: the rows of local expert 0, then 1, …; inside
        an expert by source rank, then by position there. Rows past ``sum(group_sizes)`` are zero.
        After ``keep=True`` a `Quantized` in the place of each array that was quantised.
        With ``EpConfig.layout="padded"`` [E / R, C] is in the place of [N], here and below. The
        rows of local expert e past ``group_sizes[e]`` may then be anything, NaN included, here, in
        ``weights`` and in the gradients of ``y`` and of the weights.
      weights: [N] float32, the routing weight of each row; zero on padding.
      handle: the routing, for `combine_send` and for further dispatches along it.
    """

    x: Any
    weights: jax.Array
    handle: Handle

    @property
    def group_sizes(self) -> jax.Array:
        """[E / R] int32, rows of each local expert, each a multiple of ``expert_alignment``."""
        return self.handle.group_sizes

    @property
    def num_rows(self) -> jax.Array:
        """[E / R] int32, rows of each local expert without those that fill a group up."""
        return self.handle.num_rows

    @property
    def num_dropped(self) -> jax.Array:
        """[1] int32, copies of rows that did not fit into ``wire_capacity`` or ``d.x`` here."""
        return self.handle.num_dropped

    @property
    def local_expert(self) -> jax.Array:
        """[N] int32, the local expert of each row; E / R past ``sum(group_sizes)``.

        Rows that fill up a group are of its expert. In the padded layout [E / R, C], and
        E / R past ``group_sizes`` of each expert. Of this rank: inside the ``shard_map``.
        """
        return local_expert(self.group_sizes, self.weights.shape)

    def replace(self, **changes: Any) -> DispatchResult:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)
