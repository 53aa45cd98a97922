# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine with what JAX itself offers: the peers that the library is measured against.

Every way is a pair of functions for the inside of ``jax.shard_map``, with the sizes of the library
(R ranks, T rows per rank, K slots, N rows of the grouped array, H hidden):

    dispatch(shape, x[T,H], topk_idx[T,K], topk_weights[T,K]) -> Grouped
    combine(shape, grouped, y[N,H]) -> out[T,H]

and returns the rows in the library's order. The peers get every advantage that costs them nothing:
all of them share the cheapest routing found (`route`), nobody clears rows past the last group, and
nobody counts what would be dropped (the inputs are checked to fit beforehand).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jax_smfree.bench.cases import AXIS, PEERS, Shape


class Grouped(NamedTuple):
    """Rows grouped by local expert, and whatever the same way's combine needs."""

    x: Array  # [N, H]
    group_sizes: Array  # int32 [E / R]
    weights: Array  # float32 [N]
    routing: Any


class Routing(NamedTuple):
    """The routing as the receiver needs it."""

    copy_of_row: Array  # int32 [N], flat index in [R, T, K] of the copy that each row holds
    row_of_copy: Array  # int32 [R, T, K], N if the copy's expert is on another rank
    group_sizes: Array  # int32 [E / R]


class Way(NamedTuple):
    dispatch: Callable[[Shape, Array, Array, Array], Grouped]
    combine: Callable[[Shape, Grouped, Array], Array]


class SortedCopies(NamedTuple):
    """The copies that this rank sends, in the order of their experts."""

    expert: Array  # int32 [T*K]
    copy: Array  # int32 [T*K], flat index in [T, K]
    first: Array  # int32 [E + 1], where an expert's copies begin
    counts: Array  # int32 [R, E], copies that each rank sends to each expert


def before(counts: Array, axis: int) -> Array:
    """The sum of all entries before each one."""
    return jnp.cumsum(counts, axis=axis, dtype=jnp.int32) - counts


def sort_copies(s: Shape, topk_idx: Array) -> SortedCopies:
    copies = s.rows * s.top_k
    key = jnp.sort(topk_idx.reshape(-1) * copies + jnp.arange(copies, dtype=jnp.int32))
    expert, copy = key // copies, key % copies  # packed, because XLA sorts one operand faster
    first = jnp.searchsorted(expert, jnp.arange(s.experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    return SortedCopies(expert, copy, first, lax.all_gather(jnp.diff(first), AXIS))


def route(s: Shape, topk_idx: Array) -> Routing:
    """Each rank sorts its own copies only; the receivers invert the result by one scatter of ints.

    The textbook way, an argsort of the gathered indices on every rank, does R times the work.
    """
    mine, rank = sort_copies(s, topk_idx), lax.axis_index(AXIS)
    sizes = mine.counts.sum(0)
    first = before(sizes.reshape(s.ranks, -1), 1).ravel()
    start = first + before(mine.counts, 0)[rank] - mine.first[:-1]
    row = start[mine.expert] + jnp.arange(s.rows * s.top_k, dtype=jnp.int32)
    row = jnp.zeros_like(row).at[mine.copy].set(row, mode="promise_in_bounds", unique_indices=True)
    row, owner = lax.all_gather(jnp.stack([row, topk_idx.reshape(-1)]), AXIS, axis=1)
    row = jnp.where(owner // s.local_experts == rank, row, s.capacity).reshape(-1)
    copy_of_row = jnp.zeros(s.capacity + 1, jnp.int32)
    copy_of_row = copy_of_row.at[row].set(jnp.arange(row.size, dtype=jnp.int32))[:-1]
    group_sizes = lax.dynamic_slice_in_dim(sizes, rank * s.local_experts, s.local_experts)
    return Routing(copy_of_row, row.reshape(s.ranks, s.rows, s.top_k), group_sizes)


def take(values: Array, index: Array) -> Array:
    return values.at[index].get(mode="promise_in_bounds")


def _weights(s: Shape, routing: Routing, topk_weights: Array) -> Array:
    gathered = lax.all_gather(topk_weights, AXIS).reshape(-1)
    filled = jnp.arange(s.capacity) < routing.group_sizes.sum()
    return jnp.where(filled, take(gathered, routing.copy_of_row), 0)


# all_gather: everything to everybody, then each rank picks its rows.


def _gather_dispatch(s: Shape, x: Array, topk_idx: Array, topk_weights: Array) -> Grouped:
    routing = route(s, topk_idx)
    everything = lax.all_gather(x, AXIS, tiled=True)
    picked = take(everything, routing.copy_of_row // s.top_k)
    return Grouped(picked, routing.group_sizes, _weights(s, routing, topk_weights), routing)


def _scatter_combine(s: Shape, d: Grouped, y: Array) -> Array:
    out = jnp.zeros((s.ranks * s.rows, s.hidden), jnp.float32)
    weighted = d.weights[:, None] * y.astype(jnp.float32)
    out = out.at[d.routing.copy_of_row // s.top_k].add(weighted)
    scattered: Array = lax.psum_scatter(out.astype(y.dtype), AXIS, tiled=True)
    return scattered


def weighted_sum(y: Array, rows: Array, weights: Array) -> Array:
    """[M, K] rows of y and their weights -> [M, H]: the sums over K, in float32."""
    total = jnp.zeros((), jnp.float32)
    for slot in range(rows.shape[1]):
        total += weights[:, slot, None] * take(y, rows[:, slot]).astype(jnp.float32)
    return total


def _sum_of_slots(s: Shape, d: Grouped, y: Array, rows: Array) -> Array:
    """[M, K] rows of y, ``capacity`` for none -> [M, H]: their weighted sums in float32."""
    there = jnp.minimum(rows, s.capacity - 1)
    return weighted_sum(y, there, jnp.where(rows < s.capacity, take(d.weights, there), 0))


def _gather_combine(s: Shape, d: Grouped, y: Array) -> Array:
    rows = d.routing.row_of_copy.reshape(-1, s.top_k)
    partial = _sum_of_slots(s, d, y, rows).astype(y.dtype)
    scattered: Array = lax.psum_scatter(partial, AXIS, tiled=True)
    return scattered


# all_to_all: each row once to each rank that it concerns, in blocks of a fixed size per pair.


def _exchange(blocks: Array) -> Array:
    """[R, M, H] -> [R * M, H]. The barriers keep XLA from cutting its neighbours into R pieces."""
    blocks = lax.optimization_barrier(blocks)
    received: Array = lax.optimization_barrier(lax.all_to_all(blocks, AXIS, 0, 0))
    return received.reshape(-1, blocks.shape[-1])


class PairRouting(NamedTuple):
    copy_of_row: Array
    group_sizes: Array
    position: Array  # int32 [T, R], of a row among those sent to a rank; pair_capacity if none
    rows: Array  # int32 [R, pair_capacity, K], rows of the grouped array; capacity for none


def _pair_dispatch(s: Shape, x: Array, topk_idx: Array, topk_weights: Array) -> Grouped:
    routing = route(s, topk_idx)
    block = s.pair_capacity
    goes = (topk_idx[:, :, None] // s.local_experts == jnp.arange(s.ranks)).any(1)  # [T, R]
    position = jnp.where(goes, jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1, block)
    place = jnp.arange(s.ranks) * (block + 1) + position
    source = jnp.zeros(s.ranks * (block + 1), jnp.int32)
    source = source.at[place].set(jnp.arange(s.rows, dtype=jnp.int32)[:, None])
    source = source.reshape(s.ranks, block + 1)[:, :block]
    wire = _exchange(take(x, source))

    positions_here = lax.all_to_all(position.T, AXIS, 0, 0)  # [R, T]
    in_wire = (jnp.arange(s.ranks)[:, None] * block + positions_here).reshape(-1)
    picked = take(wire, take(in_wire, routing.copy_of_row // s.top_k))
    rows = jnp.full((s.ranks, block + 1, s.top_k), s.capacity, jnp.int32)
    rows = rows.at[jnp.arange(s.ranks)[:, None], positions_here].set(routing.row_of_copy)[:, :block]
    weights = _weights(s, routing, topk_weights)
    pair = PairRouting(routing.copy_of_row, routing.group_sizes, position, rows)
    return Grouped(picked, routing.group_sizes, weights, pair)


def _pair_combine(s: Shape, d: Grouped, y: Array) -> Array:
    block = s.pair_capacity
    partial = _sum_of_slots(s, d, y, d.routing.rows.reshape(-1, s.top_k)).astype(y.dtype)
    wire = _exchange(partial.reshape(s.ranks, block, s.hidden))
    total = jnp.zeros((), jnp.float32)
    for rank in range(s.ranks):
        position = d.routing.position[:, rank]
        row = take(wire, rank * block + jnp.minimum(position, block - 1)).astype(jnp.float32)
        total += jnp.where(position[:, None] < block, row, 0)
    return total.astype(y.dtype)


WAYS = dict(
    zip(
        PEERS,
        (
            Way(_gather_dispatch, _scatter_combine),
            Way(_gather_dispatch, _gather_combine),
            Way(_pair_dispatch, _pair_combine),
        ),
        strict=True,
    )
)
"""By name. The first is what most JAX code does: all_gather and gather, scatter-add and
psum_scatter. The second sums the slots of a row instead of scattering; the third sends less."""
