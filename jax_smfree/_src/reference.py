# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine in plain ``jax.numpy``: the oracle of the tests, and a way to do without.

Every rank sends all its rows to every rank and each rank picks what its experts need, so the wire
carries far more than in the library. Everything else is the same: row order, dropping, padding,
and where values are rounded or quantised. Gradients are JAX's own differentiation of this code; but
what is quantised on the wire counts as the identity there, and its cotangent may be quantised.

The functions run inside ``jax.shard_map``, manual over ``axis``. Shapes are per rank, with the
letters of the library: R ranks, E experts, T rows sent, K slots (``top_k``), N rows of ``d.x``, or
C for each local expert in the padded layout, W elements of a row of one array. A *copy* is one
(source rank, position, slot), that is, one row for one expert.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jax_smfree._src import arguments, fp8, group_axis
from jax_smfree._src.fp8 import Fp8, Quantized, as_stored
from jax_smfree._src.rows import FLOATS, Rows, local_expert, lost

Result = TypeVar("Result")
NO_TERM = -0.0  # changes no sum, not even the sign of a zero
FROM_DISPATCH = object()  # the weights that the dispatch brought
FROM_CONFIG = object()  # how the config says that rows travel


class Config(Protocol):
    """The part of ``EpConfig`` that decides the result."""

    @property
    def num_experts(self) -> int: ...
    @property
    def wire(self) -> Fp8 | None: ...
    @property
    def grad_wire(self) -> Fp8 | None: ...
    @property
    def expert_alignment(self) -> int: ...
    @property
    def overflow(self) -> str: ...
    @property
    def mode(self) -> str | None: ...
    @property
    def ranks_per_node(self) -> int | None: ...
    def recv_shape(self, num_tokens: int, num_ranks: int) -> tuple[int, ...]: ...
    def num_wire_rows(self, num_tokens: int, num_ranks: int) -> int: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Handle:
    """Where each copy went: ``rows[s, t, k]`` is its row of ``d.x`` on this rank, or -1."""

    rows: Array  # int32 [R, T, K]
    came: Array  # bool [R, T], whether the row has an expert here
    sent: Array  # bool [T], whether this rank's row has an expert anywhere
    group_sizes: Array  # int32 [E / R], multiples of expert_alignment
    num_rows: Array  # int32 [E / R], without what fills them up
    num_dropped: Array  # int32 [1]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # (N,), or (E / R, C)
    axis: group_axis.Axis = dataclasses.field(metadata={"static": True})
    ranks_per_sum: int = dataclasses.field(metadata={"static": True})  # of a node; direct: 1
    is_error: bool = dataclasses.field(metadata={"static": True})  # to overflow

    @property
    def size(self) -> int:
        """N."""
        return math.prod(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchResult:
    """Rows received by this rank, grouped by expert; fields as in ``jax_smfree.DispatchResult``."""

    x: Any  # of [N, ...], or [E / R, C, ...]; zero on padding
    weights: Array  # float32 [N], or [E / R, C]; zero on padding
    handle: Handle

    @property
    def group_sizes(self) -> Array:
        return self.handle.group_sizes

    @property
    def num_rows(self) -> Array:
        return self.handle.num_rows

    @property
    def num_dropped(self) -> Array:
        return self.handle.num_dropped

    @property
    def local_expert(self) -> Array:
        return local_expert(self.group_sizes, self.handle.shape)


def dispatch(
    x: Any, topk_idx: Array | None = None, topk_weights: Array | None = None, *,
    axis: group_axis.Axis, config: Config, routing: Handle | None = None,
    capacity: Array | int | None = None, wire: Fp8 | None = None, grad_wire: Fp8 | None = None,
    keep: bool = False,
) -> DispatchResult:  # fmt: skip
    """Rows to the ranks of their experts.

    Shapes: ``x`` a pytree of arrays [T, ...]; ``topk_idx`` int [T, K], anything outside [0, E) is
    no expert; ``topk_weights`` float32 [T, K], or None for ones. ``routing`` is in the place of
    ``topk_idx``.
    Overflow: with ``config.overflow == "error"`` every value is NaN if a row did not fit.
    """
    if routing is None:
        assert topk_idx is not None
        handle = route(topk_idx, axis=axis, config=config, capacity=capacity)
        poisoned = handle.num_dropped[0] > 0 if handle.is_error else False
    else:
        handle, poisoned = routing, False  # what did not fit was told, and is left out

    num_ranks, tokens, top_k = handle.rows.shape
    copy = inverse(handle.rows.reshape(-1), handle.size)
    row = jnp.where(copy >= 0, copy // top_k, -1)  # of those that come from all ranks

    def received(array: Array) -> Any:
        if array.dtype not in FLOATS:
            return picked(exchange(_broadcast(array, num_ranks), axis))
        # The detour through float32 is for the gradient: there the broadcast is a sum over ranks.
        everywhere = _broadcast(as_stored(array).astype(jnp.float32), num_ranks)
        if keep and wire is not None and array.dtype in fp8.QUANTISED:
            travels = fp8.quantise(everywhere, wire)
            return Quantized(*(picked(exchange(part, axis)) for part in travels))
        came = _moved(everywhere, array.dtype, axis, wire, grad_wire)
        return as_stored(picked(came).astype(array.dtype))

    def picked(came: Array) -> Array:
        rows = take(came.reshape(num_ranks * tokens, -1), row)
        return jnp.where(poisoned, lost(rows.dtype), rows).astype(rows.dtype)

    if topk_weights is None:
        topk_weights = jnp.ones((tokens, top_k), jnp.float32)
    weights = take(exchange(_broadcast(topk_weights, num_ranks), axis).reshape(-1), copy)
    weights = jnp.where(poisoned, jnp.nan, weights)
    sent = Rows.of(x)
    arrays = [received(array) for array in sent.flat(x)]
    rows = sent.restored(jax.tree.leaves(arrays), wire if keep else None)
    rows, weights = jax.tree.map(lambda v: v.reshape(*handle.shape, *v.shape[1:]), (rows, weights))
    return DispatchResult(rows, weights, handle)


def route(
    topk_idx: Array, *, axis: group_axis.Axis, config: Config, capacity: Array | int | None = None
) -> Handle:
    """Where all copies go, and which do not fit."""
    num_ranks = jax.lax.axis_size(axis)
    tokens = topk_idx.shape[0]
    local_experts = config.num_experts // num_ranks
    expert = jax.lax.all_gather(topk_idx, axis).astype(jnp.int32)
    rank = jax.lax.axis_index(axis)
    ranks = jnp.arange(num_ranks, dtype=jnp.int32)[None, None, None, :]
    comes = jnp.any(expert[..., None] // local_experts == ranks, axis=2)
    counts = kept_counts(
        jnp.sum(comes, axis=1, dtype=jnp.int32),
        config.num_wire_rows(tokens, num_ranks),
        ranks_per_sum(config),
    )
    before_and_this = jnp.cumsum(comes[..., rank], axis=1, dtype=jnp.int32)
    kept = (before_and_this <= counts[:, rank, None])[..., None]
    expert -= rank * local_experts
    here = (expert >= 0) & (expert < local_experts)
    shape = config.recv_shape(tokens, num_ranks)
    layout = lay_out(
        jnp.where(here & kept, expert, local_experts),
        local_experts=local_experts,
        shape=shape,
        alignment=config.expert_alignment,
        capacity=shape[-1] if capacity is None else capacity,
    )
    return Handle(
        rows=layout.rows,
        came=jnp.any(here, axis=-1),
        sent=jnp.any((topk_idx >= 0) & (topk_idx < config.num_experts), axis=-1),
        group_sizes=layout.group_sizes,
        num_rows=layout.num_rows,
        num_dropped=(layout.num_dropped + jnp.sum(here & ~kept, dtype=jnp.int32))[None],
        shape=shape,
        axis=axis,
        ranks_per_sum=ranks_per_sum(config),
        is_error=config.overflow == "error",
    )


def combine(
    d: DispatchResult, y: Any, weights: Array | None, *,
    add: Any = None, wire: Fp8 | None = None, grad_wire: Fp8 | None = None,
) -> Any:  # fmt: skip
    """Results back to where their rows came from, summed over the experts.

    Shapes: ``y`` a pytree of float arrays [N, ...], ``weights`` float32 [N] (None: a plain sum)
    -> [T, ...] in the dtypes of y, as ``add`` is, which is added. In the padded layout [E / R, C]
    is in the place of [N].
    Each rank sums its experts in float32 by ascending slot and rounds once to what travels; the
    ranks are summed in float32 by ascending rank, then ``add``, and rounded once. In hierarchical
    mode the ranks of each node are summed and rounded first, and then the nodes in the same way.
    A row that was sent to a rank and lost all its copies there is NaN where that is an error.
    """
    handle = d.handle
    of_lost = jnp.nan if handle.is_error else 0.0
    none_here = jnp.where(handle.came, of_lost, NO_TERM)[..., None]

    def combined(y: Array, add: Array | None) -> Array:
        weighted = as_stored(y).astype(jnp.float32)
        if weights is not None:
            weighted = weighted * weights.reshape(-1, 1)
        partial = sum_of_slots(weighted, handle.rows, none_here)
        of_ranks = _moved(partial, y.dtype, handle.axis, wire, grad_wire)
        sums = sum_of_ranks(of_ranks, handle.ranks_per_sum, y.dtype, wire, handle.sent, add)
        return as_stored(sums)

    y = jax.tree.map(lambda v: v.reshape(-1, *v.shape[len(handle.shape) :]), y)
    rows = Rows.of(y)
    arrays = rows.flat(y)
    more = rows.flat(add) if add is not None else [None] * len(arrays)
    return rows.restored(list(map(combined, arrays, more)))


def _moved(
    rows: Array, dtype: Any, axis: group_axis.Axis, wire: Fp8 | None, grad_wire: Fp8 | None
) -> Array:
    """``rows`` [R, ..., W] of float32 as they arrive, rounded to ``dtype`` or quantised.

    So are the cotangents, on their way back.
    """

    def move(wire: Fp8 | None, rows: Array) -> Array:
        if wire is None:
            return exchange(rows.astype(dtype), axis).astype(jnp.float32)
        values, scales = fp8.quantise(rows, wire)
        return fp8.dequantise(Quantized(exchange(values, axis), exchange(scales, axis)))

    if dtype not in fp8.QUANTISED or (wire is None and grad_wire is None):
        return move(None, rows)

    def move_gradient(_: Any, rows: Array) -> Array:
        return move(grad_wire, rows)

    moved = jax.custom_jvp(functools.partial(move, wire))
    moved.defjvp(
        lambda primals, tangents: (
            moved(*primals),
            jax.custom_derivatives.linear_call(move_gradient, move_gradient, (), *tangents),
        )
    )
    result: Array = moved(rows)
    return result


def sum_of_slots(weighted: Array, rows: Array, of_none: Array | float) -> Array:
    """The sums of one rank for ``rows`` [..., K], in float32 by ascending slot.

    ``of_none`` [..., 1]: what stands for a row without copies.
    """
    terms = (take(weighted, rows[..., slot], NO_TERM) for slot in range(rows.shape[-1]))
    has_copies = jnp.any(rows >= 0, axis=-1, keepdims=True)
    return jnp.where(has_copies, _sum_in_order(terms), of_none)


def sum_of_ranks(
    terms: Array, per_sum: int, dtype: Any, wire: Fp8 | None, has_sum: Array, add: Array | None
) -> Array:
    """What the ranks returned for the rows of this one, [R, T, W] -> [T, W]; see `combine`.

    ``has_sum`` [T]: other rows are ``add`` alone, or zero.
    """
    if per_sum > 1:
        terms = jnp.stack(
            [
                _as_on_wire(_sum_in_order(terms[first : first + per_sum]), dtype, wire)
                for first in range(0, terms.shape[0], per_sum)
            ]
        )
    total = _sum_in_order(terms)
    if add is not None:
        total = total + as_stored(add).astype(jnp.float32)
    alone = 0 if add is None else add
    return jnp.where(has_sum[:, None], total.astype(dtype), alone)


def _as_on_wire(rows: Array, dtype: Any, wire: Fp8 | None) -> Array:
    if wire is None or dtype not in fp8.QUANTISED:
        return as_stored(rows.astype(dtype)).astype(jnp.float32)
    return _requantised(rows, wire)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _requantised(rows: Array, wire: Fp8) -> Array:
    return fp8.dequantise(fp8.quantise(rows, wire))


_requantised.defjvp(lambda wire, rows, tangents: (_requantised(*rows, wire), *tangents))


def ranks_per_sum(config: Config) -> int:
    """The sum of one rank is that rank: in direct mode this leaves the ranks as they are."""
    return config.ranks_per_node or 1 if config.mode == "hierarchical" else 1


class Layout(NamedTuple):
    """The routing of one dispatch, as one rank receives it."""

    rows: Array  # int32 [R, T, K]: row of each copy, -1 if it is not here
    copy: Array  # int32 [N]: flat index of the copy in each row, -1 if the row is empty
    counts: Array  # int32 [E / R]: copies, those that were dropped too
    group_sizes: Array  # int32 [E / R]
    num_rows: Array  # int32 [E / R], without padding
    num_dropped: Array  # int32 [], of these copies


def kept_counts(counts: Array, num_wire_rows: int, per_node: int) -> Array:
    """How many rows are kept of those that each rank sends to each, [source, destination].

    Of all that comes to a rank the first ``num_wire_rows`` are, by source. Before that, the ranks
    of each index in their nodes send what goes to another node through one relay there, which
    hands on as many, by source and then by destination. ``per_node`` is 1 in direct mode.
    """
    ranks = counts.shape[0]
    if per_node > 1:
        nodes = ranks // per_node
        by_relay = counts.reshape(nodes, per_node, nodes, per_node).transpose(1, 2, 0, 3)
        handed = first_rows(by_relay.reshape(per_node, nodes, ranks), num_wire_rows)
        counts = handed.reshape(by_relay.shape).transpose(2, 0, 1, 3).reshape(ranks, ranks)
    return first_rows(counts.T, num_wire_rows).T


def first_rows(counts: Array, capacity: int) -> Array:
    """How many of each of ``counts`` are among the first ``capacity`` rows, along the last axis."""
    before = jnp.cumsum(counts, axis=-1) - counts
    return jnp.clip(capacity - before, 0, counts).astype(jnp.int32)


def lay_out(
    local_expert: Array, *, local_experts: int, shape: tuple[int, ...], alignment: int,
    capacity: Array | int,
) -> Layout:  # fmt: skip
    """Order all copies (``local_expert`` [R, T, K]) by expert, source rank, position and slot.

    The expert ``local_experts`` stands for none. Every other's group starts at a multiple of
    ``alignment``: behind the one before it where ``shape`` is (N,), and at ``e * C`` where it is
    (E / R, C). Copies whose row would be ``capacity`` or later, of N or of C, are dropped; it is
    rounded down to a multiple of ``alignment``, and at most that many.
    """
    num_rows = math.prod(shape)
    capacity = jnp.clip(jnp.asarray(capacity, jnp.int32) // alignment * alignment, 0, shape[-1])
    expert = local_expert.reshape(-1)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)

    counts = jnp.zeros(local_experts + 1, jnp.int32).at[expert].add(1)
    first_in_order = jnp.cumsum(counts) - counts
    counts = counts[:local_experts]
    padded = -(-counts // alignment) * alignment
    if len(shape) == 2:
        first_row = jnp.arange(local_experts, dtype=jnp.int32) * shape[1]
        room = jnp.broadcast_to(capacity, counts.shape)
    else:
        first_row = jnp.cumsum(padded) - padded
        room = jnp.maximum(capacity - first_row, 0)

    sorted_expert = expert[order]
    place_in_group = jnp.arange(order.size, dtype=jnp.int32) - first_in_order[sorted_expert]
    here = sorted_expert < local_experts
    fits = here & (place_in_group < room.at[sorted_expert].get(mode="clip"))
    row = jnp.where(fits, first_row.at[sorted_expert].get(mode="clip") + place_in_group, -1)
    return Layout(
        rows=jnp.zeros_like(row).at[order].set(row).reshape(local_expert.shape),
        copy=jnp.full_like(row, -1, shape=(num_rows,))
        .at[jnp.where(fits, row, num_rows)]
        .set(order, mode="drop"),
        counts=counts,
        group_sizes=jnp.minimum(padded, room).astype(jnp.int32),
        num_rows=jnp.minimum(counts, room).astype(jnp.int32),
        num_dropped=jnp.sum(here & ~fits, dtype=jnp.int32),
    )


def exchange(blocks: Array, axis: group_axis.Axis) -> Array:
    """``blocks[r]`` goes to rank r; returns what each rank sent here: [R, ...] -> [R, ...]."""
    received: Array = jax.lax.all_to_all(blocks, axis, split_axis=0, concat_axis=0)
    return received


def _broadcast(x: Array, num_ranks: int) -> Array:
    return jnp.broadcast_to(x, (num_ranks, *x.shape))


def take(values: Array, index: Array, fill: float = 0) -> Array:
    """``values[index]`` along the first axis, ``fill`` where the index is -1."""
    index = jnp.where(index < 0, values.shape[0], index)
    return values.at[index].get(mode="fill", fill_value=fill)


def inverse(of: Array, size: int) -> Array:
    """[size]: the index at which each number stands in ``of``, which has -1 for none; or -1."""
    index = jnp.arange(of.size, dtype=jnp.int32)
    return jnp.full((size,), -1, jnp.int32).at[jnp.where(of < 0, size, of)].set(index, mode="drop")


def _sum_in_order(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


# The same operations in two phases, with the signatures of the library, so that code written for
# it runs on the reference unchanged. The whole work is done in the recv phase.


@dataclasses.dataclass(frozen=True)
class Group:
    """In the place of an `EpGroup` for the reference: it has no devices and no memory.

    Attributes:
      axis: of the mesh, or several, as `EpGroup.create` takes it.
      config: an `EpConfig`.

    Raises:
      ValueError, TypeError: for what names no axes, or is no config.

    Example:
      >>> stand_in = nn.ReferenceGroup("ep", config)
      >>> def layer(params, x):  # inside shard_map
      ...     return nn.moe_layer(stand_in.token(), params, x, implementation="reference")[1]
      >>> step = jax.shard_map(layer, mesh=mesh, in_specs=(specs, P("ep")), out_specs=P("ep"))
      >>> jax.jit(step)(params, x).shape
      (16, 16)
    """

    axis: group_axis.Axis
    config: Config

    def __post_init__(self) -> None:
        group_axis.checked("ReferenceGroup", self.axis)
        if not hasattr(self.config, "recv_shape"):
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
    how: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), metadata={"static": True})

    def _sent(self, *operands: Any, **how: Any) -> "Token":
        return dataclasses.replace(self, in_flight=operands, how=tuple(how.items()))

    def _received(self) -> "Token":
        return dataclasses.replace(self, in_flight=(), how=())


def dispatch_send(
    token: Token, x: Any, topk_idx: Array | None = None, topk_weights: Array | None = None, *,
    routing: Handle | None = None, wire: Any = FROM_CONFIG, grad_wire: Any = FROM_CONFIG,
    keep: bool = False,
) -> Token:  # fmt: skip
    config = token.group.config
    wire = config.wire if wire is FROM_CONFIG else wire
    grad_wire = config.grad_wire if grad_wire is FROM_CONFIG else grad_wire
    operands = (x, topk_idx, topk_weights, routing)
    return token._sent(*operands, wire=wire, grad_wire=grad_wire, keep=keep)


def dispatch_recv(
    token: Token, *, capacity: Array | int | None = None
) -> tuple[DispatchResult, Token]:
    *operands, routing = token.in_flight
    result = dispatch(
        *operands, routing=routing, axis=token.group.axis, config=token.group.config,
        capacity=capacity, **dict(token.how),
    )  # fmt: skip
    return result, token._received()


def combine_send(
    token: Token, d: DispatchResult, y: Any, weights: Any = FROM_DISPATCH, *,
    wire: Fp8 | None = None, grad_wire: Fp8 | None = None,
) -> Token:  # fmt: skip
    weights = d.weights if weights is FROM_DISPATCH else weights
    return token._sent(d, y, weights, wire=wire, grad_wire=grad_wire)


def combine_recv(token: Token, *, add: Any = None) -> tuple[Any, Token]:
    return combine(*token.in_flight, add=add, **dict(token.how)), token._received()


def overlap(token: Token, fn: Callable[..., Result], *args: Any) -> tuple[Token, Result]:
    return token, fn(*args)
