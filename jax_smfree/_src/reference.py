# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine in plain ``jax.numpy``: the oracle of the tests, and a way to do without.

Every rank sends all its rows to every rank and each rank picks what its experts need, so the wire
carries far more than in the library. Everything else is the same: row order, dropping, padding,
and where values are rounded. Gradients are JAX's own differentiation of this code.

The functions run inside ``jax.shard_map``, manual over ``axis``. Shapes are per rank, with the
letters of the library: R ranks, E experts, T rows sent, K slots (``top_k``), H hidden, N rows of
``d.x``. A *copy* is one (source rank, position, slot), that is, one row for one expert.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jax_smfree._src import arguments, group_axis

Result = TypeVar("Result")
FROM_DISPATCH = object()  # the weights that the dispatch brought


class Config(Protocol):
    """The part of ``EpConfig`` that decides the result."""

    @property
    def num_experts(self) -> int: ...
    @property
    def expert_alignment(self) -> int: ...
    @property
    def overflow(self) -> str: ...
    @property
    def mode(self) -> str | None: ...
    @property
    def ranks_per_node(self) -> int | None: ...
    def num_recv_rows(self, num_tokens: int, num_ranks: int) -> int: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Handle:
    """Where each copy went: ``rows[s, t, k]`` is its row of ``d.x`` on this rank, or -1."""

    rows: Array  # int32 [R, T, K]
    axis: group_axis.Axis = dataclasses.field(metadata={"static": True})
    ranks_per_sum: int = dataclasses.field(metadata={"static": True})  # of a node; direct: 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchResult:
    """Rows received by this rank, grouped by expert; fields as in ``jax_smfree.DispatchResult``."""

    x: Array  # [N, H], rows past sum(group_sizes) are zero
    group_sizes: Array  # int32 [E / R], multiples of expert_alignment
    weights: Array  # float32 [N], zero on padding
    num_dropped: Array  # int32 [1]
    handle: Handle


def dispatch(
    x: Array, topk_idx: Array, topk_weights: Array | None, *, axis: group_axis.Axis, config: Config
) -> DispatchResult:
    """Rows to the ranks of their experts.

    Shapes: ``x`` [T, H]; ``topk_idx`` int [T, K], anything outside [0, E) is no expert;
    ``topk_weights`` float32 [T, K], or None for ones.
    Overflow: with ``config.overflow == "error"`` every value is NaN if a row did not fit.
    """
    num_ranks = jax.lax.axis_size(axis)
    rows_sent, top_k = topk_idx.shape
    local_experts = config.num_experts // num_ranks
    if topk_weights is None:
        topk_weights = jnp.ones(topk_idx.shape, jnp.float32)

    layout = lay_out(
        jax.lax.all_gather(topk_idx, axis),
        first_expert=jax.lax.axis_index(axis) * local_experts,
        local_experts=local_experts,
        num_rows=config.num_recv_rows(rows_sent, num_ranks),
        alignment=config.expert_alignment,
    )
    # The detour through float32 is for the gradient: there the broadcast is a sum over ranks.
    wire_x = _exchange(_broadcast(x.astype(jnp.float32), num_ranks).astype(x.dtype), axis)
    wire_weights = _exchange(_broadcast(topk_weights, num_ranks), axis)

    row_of_copy = wire_x.reshape(num_ranks * rows_sent, -1).astype(jnp.float32)
    received = _take(row_of_copy, jnp.where(layout.copy >= 0, layout.copy // top_k, -1))
    weights = _take(wire_weights.reshape(-1), layout.copy)
    if config.overflow == "error":
        overflowed = layout.num_dropped > 0
        received = jnp.where(overflowed, jnp.nan, received)
        weights = jnp.where(overflowed, jnp.nan, weights)
    return DispatchResult(
        x=received.astype(x.dtype),
        group_sizes=layout.group_sizes,
        weights=weights,
        num_dropped=layout.num_dropped[None],
        handle=Handle(layout.rows, axis, _ranks_per_sum(config)),
    )


def combine(d: DispatchResult, y: Array, weights: Array | None) -> Array:
    """Results back to where their rows came from, summed over the experts.

    Shapes: ``y`` [N, H], ``weights`` float32 [N] (None: a plain sum) -> [T, H] in y's dtype.
    Each rank sums its experts in float32 by ascending slot and rounds once to the dtype of the
    wire; the ranks are summed in float32 by ascending rank, and rounded once. In hierarchical mode
    the ranks of each node are summed and rounded first, and then the nodes in the same way.
    """
    rows = d.handle.rows
    num_ranks, _, top_k = rows.shape
    weighted = y.astype(jnp.float32)
    if weights is not None:
        weighted = weighted * weights[:, None]
    partial = _sum_in_order(_take(weighted, rows[:, :, slot]) for slot in range(top_k))
    of_ranks = _exchange(partial.astype(y.dtype), d.handle.axis).astype(jnp.float32)
    per_sum = d.handle.ranks_per_sum
    of_nodes = [
        _sum_in_order(of_ranks[first : first + per_sum]).astype(y.dtype).astype(jnp.float32)
        for first in range(0, num_ranks, per_sum)
    ]
    return _sum_in_order(of_nodes).astype(y.dtype)


def _ranks_per_sum(config: Config) -> int:
    """The sum of one rank is that rank: in direct mode this leaves the ranks as they are."""
    return config.ranks_per_node or 1 if config.mode == "hierarchical" else 1


class Layout(NamedTuple):
    """The routing of one dispatch, as one rank receives it."""

    rows: Array  # int32 [R, T, K]: row of each copy, -1 if it is not here
    copy: Array  # int32 [N]: flat index of the copy in each row, -1 if the row is empty
    group_sizes: Array  # int32 [E / R]
    num_dropped: Array  # int32 []


def lay_out(
    topk_idx: Array, *, first_expert: Array, local_experts: int, num_rows: int, alignment: int
) -> Layout:
    """Order all copies (``topk_idx`` [R, T, K]) by expert, source rank, position and slot.

    Every expert's group starts at a multiple of ``alignment``. Copies whose row would be
    ``num_rows`` or later are dropped.
    """
    nowhere = local_experts
    expert = topk_idx.reshape(-1).astype(jnp.int32) - first_expert
    expert = jnp.where((expert >= 0) & (expert < local_experts), expert, nowhere)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)

    counts = jnp.zeros(local_experts + 1, jnp.int32).at[expert].add(1)
    padded = (-(-counts // alignment) * alignment).at[nowhere].set(0)
    first_row = jnp.cumsum(padded) - padded
    first_in_order = jnp.cumsum(counts) - counts
    ends = jnp.minimum(jnp.cumsum(padded)[:local_experts], num_rows)

    sorted_expert = expert[order]
    place_in_group = jnp.arange(order.size, dtype=jnp.int32) - first_in_order[sorted_expert]
    row = first_row[sorted_expert] + place_in_group
    here = sorted_expert < nowhere
    fits = here & (row < num_rows)
    row = jnp.where(fits, row, -1)
    return Layout(
        rows=jnp.zeros_like(row).at[order].set(row).reshape(topk_idx.shape),
        copy=jnp.full_like(row, -1, shape=(num_rows,))
        .at[jnp.where(fits, row, num_rows)]
        .set(order, mode="drop"),
        group_sizes=jnp.diff(ends, prepend=0).astype(jnp.int32),
        num_dropped=jnp.sum(here & ~fits, dtype=jnp.int32),
    )


def _exchange(blocks: Array, axis: group_axis.Axis) -> Array:
    """``blocks[r]`` goes to rank r; returns what each rank sent here: [R, ...] -> [R, ...]."""
    received: Array = jax.lax.all_to_all(blocks, axis, split_axis=0, concat_axis=0)
    return received


def _broadcast(x: Array, num_ranks: int) -> Array:
    return jnp.broadcast_to(x, (num_ranks, *x.shape))


def _take(values: Array, index: Array) -> Array:
    """``values[index]`` along the first axis, zero where the index is -1."""
    index = jnp.where(index < 0, values.shape[0], index)
    return values.at[index].get(mode="fill", fill_value=0)


def _sum_in_order(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


# The same operations in two phases, with the signatures of the library, so that code written for
# it runs on the reference unchanged. The whole work is done in the recv phase.


@dataclasses.dataclass(frozen=True)
class Group:
    """What the reference needs to know of an ``EpGroup``."""

    axis: group_axis.Axis
    config: Config

    def __post_init__(self) -> None:
        group_axis.checked("ReferenceGroup", self.axis)
        if not hasattr(self.config, "num_recv_rows"):
            raise TypeError(
                f"ReferenceGroup: got {arguments.shown(self.config)} as config, expected an "
                "EpConfig."
            )

    def token(self, lane: int = 0) -> "Token":
        """A ready token. Nothing is ever in flight here, so lanes are all the same."""
        del lane
        return Token((), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Token:
    """Stands in for the library's token; between send and recv it holds the operands."""

    in_flight: tuple[Any, ...]
    group: Group = dataclasses.field(metadata={"static": True})


def dispatch_send(token: Token, x: Array, topk_idx: Array, topk_weights: Array | None) -> Token:
    return dataclasses.replace(token, in_flight=(x, topk_idx, topk_weights))


def dispatch_recv(token: Token) -> tuple[DispatchResult, Token]:
    group = token.group
    result = dispatch(*token.in_flight, axis=group.axis, config=group.config)
    return result, dataclasses.replace(token, in_flight=())


def combine_send(token: Token, d: DispatchResult, y: Array, weights: Any = FROM_DISPATCH) -> Token:
    weights = d.weights if weights is FROM_DISPATCH else weights
    return dataclasses.replace(token, in_flight=(d, y, weights))


def combine_recv(token: Token) -> tuple[Array, Token]:
    return combine(*token.in_flight), dataclasses.replace(token, in_flight=())


def overlap(token: Token, fn: Callable[..., Result], *args: Any) -> tuple[Token, Result]:
    return token, fn(*args)
