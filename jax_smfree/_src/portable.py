# SPDX-License-Identifier: Apache-2.0
"""The phases in plain ``jax.numpy`` over JAX's own collectives: what a portable group runs.

A primitive lowers to the function of its name here, with the operands and results that it has on
every backend; `reference` lays out and sums. So routing, rows, order and bits are those of the
other backends, and typestate, differentiation and rematerialisation never ask which one it is.

There is no memory beside the arrays of the program. So a token in flight carries the messages: its
own numbers first, then a block for every rank: 1 + how many rows it has, and room for all T. A row
is its leaves as they travel and, where the operation carries slots, a float and an expert for each
of its K slots; all of it as words of 32 bits, because what moves must not be rounded. The recv
phase begins with the exchange of the blocks, and nothing moves before it. What does not fit on the
wire is cut by its receiver, after it has moved.

Below, a *place* is a row of the blocks, ``rank * T + position``; the *number* of a received row is
the first index of the handle's ``rows``. Letters are those of `primitives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import bitcast_convert_type

from jax_smfree._src import fp8, portable_reports, reference
from jax_smfree._src.rows import Leaf, aligned

if TYPE_CHECKING:
    from jax_smfree._src.primitives import Call


def message_floats(num_ranks: int, num_tokens: int, row_bytes: int, slot_width: int) -> int:
    """How many floats longer a token is in flight."""
    return num_ranks * (1 + num_tokens * (row_bytes // 4 + 2 * slot_width))


def dispatch_send(
    token: Array, topk_idx: Array, weights: Array, *x: Array, call: Call
) -> list[Array]:
    ranks, tokens = call.group.num_ranks, call.num_tokens
    faulty = portable_reports.check_routing(topk_idx, call)
    weights, *leaves = (_poisoned(faulty, v) for v in (weights, *x))

    rank_of_slot = jnp.where(topk_idx < 0, -1, topk_idx // _local_experts(call))
    sent = jnp.any(rank_of_slot == jnp.arange(ranks)[:, None, None], axis=-1)  # [R, T]
    position = jnp.cumsum(sent, axis=1, dtype=jnp.int32) - 1
    nowhere = ranks * tokens
    place = jnp.where(
        sent, jnp.arange(ranks, dtype=jnp.int32)[:, None] * tokens + position, nowhere
    )
    places = jnp.sort(place.T, axis=1)[:, : min(call.group.config.top_k, ranks)]
    places = jnp.where(places == nowhere, -1, places)
    send_counts = jnp.sum(sent, axis=1, dtype=jnp.int32)
    in_flight = _send(token, weights, topk_idx, places, send_counts, leaves, call)
    return [in_flight, places, send_counts]


def dispatch_recv(token: Array, capacity: Array, *, call: Call) -> list[Array]:
    config = call.group.config
    token, sent_counts, words, weights, experts = _receive(token, call)
    recv_counts = _kept_counts(sent_counts, call)
    place = _place_of_number(recv_counts, call)
    local_experts = _local_experts(call)
    local_expert = experts - jax.lax.axis_index(call.group.axis) * local_experts
    here = (local_expert >= 0) & (local_expert < local_experts)
    local_expert = jnp.where(here, local_expert, local_experts)
    layout = reference.lay_out(
        reference.take(local_expert, place, local_experts),
        local_experts=local_experts,
        shape=config.recv_shape(call.num_tokens, call.group.num_ranks),
        alignment=config.expert_alignment,
        capacity=capacity[0],
    )
    weights, *x = _scatter(words, weights, layout.copy, place, call)
    num_dropped = jnp.sum(here, dtype=jnp.int32) - jnp.sum(layout.copy >= 0, dtype=jnp.int32)
    overflowed = portable_reports.check_capacity(
        num_dropped,
        jnp.sum(sent_counts),
        jnp.any(recv_counts < sent_counts),
        capacity[0],
        layout.counts,
        call,
    )
    weights, *x = (_poisoned(overflowed, v) for v in (weights, *x))
    return [
        token,
        weights,
        layout.group_sizes,
        layout.num_rows,
        num_dropped[None],
        layout.rows,
        recv_counts,
        jnp.full(call.group.relay_shape(call.num_tokens), -1, jnp.int32),
        *x,
    ]


def dispatch_send_cached(
    token: Array, slots: Array, places: Array, send_counts: Array, *x: Array, call: Call
) -> list[Array]:
    experts = jnp.zeros(slots.shape, jnp.int32)  # the receiver has them in its handle
    return [_send(token, slots, experts, places, send_counts, x, call)]


def dispatch_recv_cached(
    token: Array, rows: Array, recv_counts: Array, relay: Array, *, call: Call
) -> list[Array]:
    del relay
    token, _, words, slots, _ = _receive(token, call)
    copy, place = _copy_in(rows, call), _place_of_number(recv_counts, call)
    return [token, *_scatter(words, slots, copy, place, call)]


def dispatch_recv_weighted(
    token: Array, weights: Array, rows: Array, recv_counts: Array, relay: Array, *y: Array,
    call: Call,
) -> list[Array]:  # fmt: skip
    token, _, *received = dispatch_recv_cached(token, rows, recv_counts, relay, call=call)
    here = (_copy_in(rows, call) >= 0)[:, None]
    values, x = jnp.zeros(weights.shape, jnp.float32), []
    for to, row in zip(y, received, strict=True):
        values += jnp.sum(to.astype(jnp.float32) * row.astype(jnp.float32), axis=1)
        weighted = (row.astype(jnp.float32) * weights[:, None]).astype(row.dtype)
        x.append(jnp.where(here, weighted, 0).astype(row.dtype))
    return [token, values, *x]


def combine_send(
    token: Array, values: Array, rows: Array, recv_counts: Array, relay: Array, *y: Array,
    call: Call,
) -> list[Array]:  # fmt: skip
    del relay
    slots = reference.take(values, rows[:, : call.slot_width])
    return [_return(token, [v.astype(jnp.float32) for v in y], slots, rows, recv_counts, call)]


def combine_send_weighted(
    token: Array, weights: Array, rows: Array, recv_counts: Array, relay: Array, *y: Array,
    call: Call,
) -> list[Array]:  # fmt: skip
    del relay
    weighted = [v.astype(jnp.float32) * weights[:, None] for v in y]
    no_slots = jnp.zeros((rows.shape[0], 0), jnp.float32)
    return [_return(token, weighted, no_slots, rows, recv_counts, call)]


def combine_recv(
    token: Array, places: Array, send_counts: Array, *add: Array, call: Call
) -> list[Array]:
    del send_counts
    ranks, tokens = call.group.num_ranks, call.num_tokens
    token, kept_counts, words, slots, _ = _receive(token, call)
    was_sent = (kept_counts >= 0)[:, None]
    first = jnp.arange(ranks, dtype=jnp.int32)[:, None, None] * tokens
    there = (places >= first) & (places < first + tokens)
    sent = jnp.any(there, axis=-1) & was_sent  # [R, T]: of each row, in each block
    place = jnp.max(jnp.where(there, places, -1), axis=-1)
    kept = sent & (place < first[..., 0] + kept_counts[:, None])
    place = jnp.where(kept, place, -1)

    per_sum = reference.ranks_per_sum(call.group.config)
    is_error = call.group.config.overflow == "error"
    of_cut = _lost_rows(sent & ~kept) if is_error else _of_cut_rows(sent, kept, per_sum)
    has_sum = jnp.any(sent if is_error else kept, axis=0)
    out = []
    returned = _rows(reference.take(words, place.reshape(-1)), call)
    for leaf, rows, more in zip(call.leaves, returned, add or [None] * len(returned), strict=True):
        rows = rows.astype(jnp.float32).reshape(ranks, tokens, -1)
        of_ranks = jnp.where(kept[..., None], rows, of_cut)
        out.append(reference.sum_of_ranks(of_ranks, per_sum, leaf.dtype, call.wire, has_sum, more))
    # One rank at most has the expert of a slot.
    return [token, jnp.sum(reference.take(slots, place), axis=0), *out]


def _lost_rows(cut: Array) -> Array:
    return jnp.where(cut, jnp.nan, reference.NO_TERM)[..., None]


def _of_cut_rows(sent: Array, kept: Array, per_sum: int) -> Array:
    """The term of a row that a rank does not return.

    None at all; but a node that rows went to has a sum, and if all were cut there, it is zero.
    """
    if per_sum == 1:
        return jnp.asarray(reference.NO_TERM)

    def in_node(of_ranks: Array) -> Array:
        of_nodes = of_ranks.reshape(-1, per_sum, of_ranks.shape[1])
        return jnp.repeat(jnp.any(of_nodes, axis=1), per_sum, axis=0)

    return jnp.where(in_node(sent) & ~in_node(kept), 0.0, reference.NO_TERM)[..., None]


# ---- places and copies ---------------------------------------------------------------------------


def _local_experts(call: Call) -> int:
    return call.group.config.num_experts // call.group.num_ranks


def _kept_counts(sent_counts: Array, call: Call) -> Array:
    """[R]: of the rows that each rank sent here, how many fit on the wire; the first ones do."""
    per_node = reference.ranks_per_sum(call.group.config)
    if per_node == 1:
        return reference.first_rows(sent_counts, call.num_wire_rows)
    counts = jax.lax.all_gather(sent_counts, call.group.axis, axis=1)  # [source, destination]
    kept = reference.kept_counts(counts, call.num_wire_rows, per_node)
    return kept[:, jax.lax.axis_index(call.group.axis)]


def _number_at_place(recv_counts: Array, call: Call) -> Array:
    """[R * T]: the number of the row at each place, -1 where none was kept."""
    position = jnp.arange(call.num_tokens, dtype=jnp.int32)
    first = jnp.cumsum(recv_counts) - recv_counts
    number = jnp.where(position < recv_counts[:, None], first[:, None] + position, -1)
    return number.reshape(-1)


def _place_of_number(recv_counts: Array, call: Call) -> Array:
    """[B]: the place of each received row; -1 past the last."""
    return reference.inverse(_number_at_place(recv_counts, call), call.num_wire_rows)


def _copy_in(rows: Array, call: Call) -> Array:
    """[N]: the copy in each row of ``d.x``, ``number * K + slot``; -1 for none."""
    return reference.inverse(rows.reshape(-1), call.num_rows)


def _scatter(
    words: Array, slots: Array, copy: Array, place: Array, call: Call
) -> tuple[Array, ...]:
    """The floats that ride with the rows of ``d.x``, [N or 0], and what these are, by leaf."""
    top_k = call.group.config.top_k
    from_place = reference.take(place, jnp.where(copy < 0, -1, copy // top_k), -1)
    rows = _rows(reference.take(words, from_place), call)
    x = [v.astype(leaf.dtype) for leaf, v in zip(call.leaves, rows, strict=True)]
    if not call.carries_slots:
        return jnp.zeros((0,), jnp.float32), *x
    slot = jnp.where(copy < 0, -1, from_place * top_k + copy % top_k)
    return reference.take(slots.reshape(-1), slot), *x


# ---- messages ------------------------------------------------------------------------------------


def _send(
    token: Array, slots: Array, experts: Array, places: Array, send_counts: Array,
    x: Sequence[Array], call: Call,
) -> Array:  # fmt: skip
    """The rows of this rank, at their places; -1 as the experts of an empty place."""
    ranks, tokens = call.group.num_ranks, call.num_tokens
    row = reference.inverse(places.reshape(-1), ranks * tokens)
    row = jnp.where(row < 0, -1, row // places.shape[1])
    parts = (
        reference.take(_words(x, tokens, call), row),
        reference.take(slots, row),
        reference.take(experts, row, -1),
    )
    return _in_flight(token, send_counts, *parts)


def _return(
    token: Array, weighted: Sequence[Array], slots: Array, rows: Array, recv_counts: Array,
    call: Call,
) -> Array:  # fmt: skip
    """The sums of this rank for the rows that it kept, at the places that they came from."""
    of_none = jnp.nan if call.group.config.overflow == "error" else 0.0
    sums = [reference.sum_of_slots(v, rows, of_none) for v in weighted]
    number = _number_at_place(recv_counts, call)
    words = _words(sums, rows.shape[0], call)
    words, slots = (reference.take(v, number) for v in (words, slots))
    return _in_flight(token, recv_counts, words, slots, jnp.zeros_like(slots, jnp.int32))


def _in_flight(token: Array, counts: Array, words: Array, slots: Array, experts: Array) -> Array:
    """``token`` and the blocks for all ranks: their ``counts`` [R], and parts [R * T, ...]."""
    parts = [words, *(bitcast_convert_type(v, jnp.uint32) for v in (slots, experts))]
    rows = jnp.concatenate(parts, axis=-1).reshape(counts.size, -1)
    counted = counts[:, None].astype(jnp.uint32) + 1
    message = jnp.concatenate([counted, rows], axis=1).reshape(-1)
    return jnp.concatenate([token, bitcast_convert_type(message, jnp.float32)])


def _receive(token: Array, call: Call) -> tuple[Array, Array, Array, Array, Array]:
    """The token, and what the ranks sent here: counts [R]; words, slots, experts [R * T, ...].

    The count is -1 where the token is a cotangent for which nothing was sent, that is, zero.
    """
    ranks, tokens = call.group.num_ranks, call.num_tokens
    width, own = call.row_bytes // 4, token.shape[0] - call.message_floats
    message = bitcast_convert_type(token[own:], jnp.uint32).reshape(ranks, -1)
    message = reference.exchange(message, call.group.axis)
    rows = message[:, 1:].reshape(ranks * tokens, width + 2 * call.slot_width)
    words, slots, experts = jnp.split(rows, [width, width + call.slot_width], axis=-1)
    return (
        token[:own],
        message[:, 0].astype(jnp.int32) - 1,
        words,
        bitcast_convert_type(slots, jnp.float32),
        bitcast_convert_type(experts, jnp.int32),
    )


# ---- rows as words of 32 bits --------------------------------------------------------------------


def _words(rows: Sequence[Array], num_rows: int, call: Call) -> Array:
    """``rows`` of float32 sums or in the dtypes of their leaves, as they travel."""
    parts: list[Array] = []
    for leaf, row in zip(call.leaves, rows, strict=True):
        if call.wire is not None and leaf.is_quantised(call.wire):
            parts += map(_words_of, fp8.quantise(row, call.wire))
        else:
            parts.append(_words_of(row.astype(leaf.dtype)))
    used = sum(part.shape[-1] for part in parts)
    rest = jnp.zeros((num_rows, call.row_bytes // 4 - used), jnp.uint32)
    return jnp.concatenate([*parts, rest], axis=-1)


def _rows(words: Array, call: Call) -> list[Array]:
    """What `_words` came from; in float32 where it was quantised."""
    rows, first = [], 0

    def taken(leaf: Leaf) -> Array:
        nonlocal first
        part = words[:, first : first + aligned(leaf.width * leaf.dtype.itemsize) // 4]
        first += part.shape[-1]
        return _elements(part, leaf)

    for leaf in call.leaves:
        parts = [taken(part) for part in leaf.on_wire(call.wire)]
        rows.append(fp8.dequantise(fp8.Quantized(*parts)) if len(parts) == 2 else parts[0])
    return rows


def _words_of(rows: Array) -> Array:
    """``rows`` [*, width], up to a multiple of 16 bytes."""
    size = rows.dtype.itemsize
    missing = -(rows.shape[-1] * size) % 16 // size
    # As integers before anything else: padding floats of 16 bits changes the bits of NaNs.
    if rows.dtype == jnp.bool_:
        rows = rows.astype(jnp.uint8)
    else:
        rows = bitcast_convert_type(rows, jnp.dtype(f"uint{8 * size}"))
    rows = jnp.pad(rows, [(0, 0), (0, missing)])
    if size < 4:
        rows = rows.reshape(rows.shape[0], -1, 4 // size)
    return bitcast_convert_type(rows, jnp.uint32).reshape(rows.shape[0], -1)


def _elements(words: Array, leaf: Leaf) -> Array:
    """What `_words_of` came from."""
    size, dtype = leaf.dtype.itemsize, leaf.dtype
    if size > 4:
        words = words.reshape(words.shape[0], -1, 2)
    rows = bitcast_convert_type(words, jnp.dtype(f"uint{8 * size}"))
    rows = rows.reshape(words.shape[0], -1)[:, : leaf.width]
    return rows.astype(bool) if dtype == jnp.bool_ else bitcast_convert_type(rows, dtype)


def _poisoned(is_lost: Array, rows: Array) -> Array:
    """``rows``, or what stands for rows that are lost."""
    if rows.dtype == jnp.bool_:
        return is_lost | rows
    bits = bitcast_convert_type(rows, jnp.dtype(f"uint{8 * rows.dtype.itemsize}"))
    return bitcast_convert_type(jnp.where(is_lost, ~jnp.zeros_like(bits), bits), rows.dtype)
