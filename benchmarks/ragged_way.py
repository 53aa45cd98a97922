# SPDX-License-Identifier: Apache-2.0
"""One more of JAX's ways: ``ragged_all_to_all``, which sends every copy of a row, and nothing more.

It does not run on every platform, and is slow on GPUs. So both packages ask it first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_smfree.bench.cases import AXIS, Shape
from jax_smfree.bench.jax_ways import Grouped, Way, before, sort_copies, take, weighted_sum


class Routing(NamedTuple):
    place: Array  # int32 [T, K], where a copy stands among all that its rank sends
    to_wire: Array  # int32 [N], the received row that each grouped row is; 0 past the last
    from_wire: Array  # int32 [N], its inverse
    counts: Array  # int32 [R, R], copies that each rank sends to each
    topk_weights: Array


def _regrouped(counts: Array, capacity: int) -> Array:
    """[A, B] sizes of blocks, in the order (b, a) -> int32 [N]: rows in the order (a, b)."""
    start = before(counts.T.ravel(), 0).reshape(counts.shape[::-1]).T  # of (a, b) in (b, a)
    new_start = before(counts.ravel(), 0)
    row = jnp.arange(capacity, dtype=jnp.int32)
    block = jnp.searchsorted(new_start, row, side="right").astype(jnp.int32) - 1
    old = start.ravel()[block] + row - new_start[block]
    return jnp.where(row < counts.sum(), old, 0)


def _dispatch(s: Shape, x: Array, topk_idx: Array, topk_weights: Array) -> Grouped:
    mine, me = sort_copies(s, topk_idx), lax.axis_index(AXIS)
    every = mine.counts.reshape(s.ranks, s.ranks, s.local_experts)
    counts, here = every.sum(2), every[:, me]  # [R, R] and [R, E / R]
    wire = lax.ragged_all_to_all(
        take(x, mine.copy // s.top_k),
        jnp.zeros((s.capacity, s.hidden), x.dtype),
        before(counts[me], 0),
        counts[me],
        before(counts, 0)[me],
        counts[:, me],
        axis_name=AXIS,
    )
    to_wire, from_wire = _regrouped(here.T, s.capacity), _regrouped(here, s.capacity)
    place = jnp.zeros_like(mine.copy).at[mine.copy].set(jnp.arange(mine.copy.size, dtype=jnp.int32))
    routing = Routing(place.reshape(s.rows, s.top_k), to_wire, from_wire, counts, topk_weights)
    ones = jnp.ones(s.capacity, jnp.float32)  # the weights stay at home, and are applied there
    return Grouped(take(wire, to_wire), here.sum(0), ones, routing)


def _combine(s: Shape, d: Grouped, y: Array) -> Array:
    routing, me = d.routing, lax.axis_index(AXIS)
    counts = routing.counts
    wire = lax.ragged_all_to_all(
        take(y, routing.from_wire),
        jnp.zeros((s.rows * s.top_k, s.hidden), y.dtype),
        before(counts[:, me], 0),
        counts[:, me],
        before(counts, 1)[:, me],
        counts[me],
        axis_name=AXIS,
    )
    return weighted_sum(wire, routing.place, routing.topk_weights).astype(y.dtype)


RAGGED_WAY = Way(_dispatch, _combine)


def ragged_all_to_all_error(mesh: jax.sharding.Mesh) -> str | None:
    """Why ``jax.lax.ragged_all_to_all`` cannot be a peer on this platform; ``None`` if it can."""
    ranks = mesh.shape[AXIS]

    def exchange(x: Array) -> Array:
        ones = jnp.ones(ranks, jnp.int32)
        offsets = jnp.arange(ranks, dtype=jnp.int32)
        there = jnp.full(ranks, lax.axis_index(AXIS), jnp.int32)
        return lax.ragged_all_to_all(
            x, jnp.zeros_like(x), offsets, ones, there, ones, axis_name=AXIS
        )

    spec = jax.sharding.PartitionSpec(AXIS)
    program = jax.jit(
        jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    try:
        jax.block_until_ready(program(jnp.zeros((ranks * ranks, 8))))
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return None
