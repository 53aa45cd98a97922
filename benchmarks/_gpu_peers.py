# SPDX-License-Identifier: Apache-2.0
"""JAX's own ways on the GPUs: those of ``jax_smfree.bench``, and ``ragged_all_to_all``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from _gpu_cases import Case, GpuShape, Scale
from _gpu_library import expected
from _gpu_timing import Json, batch_times, prepare, summary
from jax import Array, lax

from jax_smfree.bench.cases import AXIS
from jax_smfree.bench.jax_ways import WAYS, Grouped, Way, ragged_all_to_all_error

RAGGED = "ragged_all_to_all"
# Rounded to bfloat16 once or twice, in another order.
MAX_RELATIVE_ERROR = 1e-2


class RaggedRouting(NamedTuple):
    place: Array  # int32 [T, K], where a copy stands among all that its rank sends
    to_wire: Array  # int32 [N], the received row that each grouped row is; 0 past the last
    from_wire: Array  # int32 [N], its inverse
    counts: Array  # int32 [R, R], copies that each rank sends to each
    topk_weights: Array


def _before(counts: Array, axis: int) -> Array:
    return jnp.cumsum(counts, axis=axis, dtype=jnp.int32) - counts


def _regrouped(counts: Array, capacity: int) -> Array:
    """[A, B] sizes of blocks, in the order (b, a) -> int32 [N]: rows in the order (a, b)."""
    start = _before(counts.T.ravel(), 0).reshape(counts.shape[::-1]).T  # of (a, b) in (b, a)
    new_start = _before(counts.ravel(), 0)
    row = jnp.arange(capacity, dtype=jnp.int32)
    block = jnp.searchsorted(new_start, row, side="right").astype(jnp.int32) - 1
    old = start.ravel()[block] + row - new_start[block]
    return jnp.where(row < counts.sum(), old, 0)


def _ragged_dispatch(s: GpuShape, x: Array, topk_idx: Array, topk_weights: Array) -> Grouped:
    copies, me = s.rows * s.top_k, lax.axis_index(AXIS)
    key = jnp.sort(topk_idx.reshape(-1) * copies + jnp.arange(copies, dtype=jnp.int32))
    expert, copy = key // copies, key % copies
    mine = jnp.searchsorted(expert, jnp.arange(s.experts + 1, dtype=jnp.int32))
    every = lax.all_gather(jnp.diff(mine).astype(jnp.int32), AXIS)  # [R, E]
    every = every.reshape(s.ranks, s.ranks, s.local_experts)
    counts, here = every.sum(2), every[:, me]  # [R, R] and [R, E / R]
    wire = lax.ragged_all_to_all(
        x[copy // s.top_k],
        jnp.zeros((s.capacity, s.hidden), x.dtype),
        _before(counts[me], 0),
        counts[me],
        _before(counts, 0)[me],
        counts[:, me],
        axis_name=AXIS,
    )
    to_wire, from_wire = _regrouped(here.T, s.capacity), _regrouped(here, s.capacity)
    sizes = here.sum(0)
    place = jnp.zeros_like(copy).at[copy].set(jnp.arange(copies, dtype=jnp.int32))
    routing = RaggedRouting(
        place.reshape(s.rows, s.top_k), to_wire, from_wire, counts, topk_weights
    )
    ones = jnp.ones(s.capacity, jnp.float32)  # the weights stay at home, and are applied there
    return Grouped(wire[to_wire], sizes, ones, routing)


def _ragged_combine(s: GpuShape, d: Grouped, y: Array) -> Array:
    routing, me = d.routing, lax.axis_index(AXIS)
    counts = routing.counts
    wire = lax.ragged_all_to_all(
        y[routing.from_wire],
        jnp.zeros((s.rows * s.top_k, s.hidden), y.dtype),
        _before(counts[:, me], 0),
        counts[:, me],
        _before(counts, 1)[:, me],
        counts[me],
        axis_name=AXIS,
    )
    total = jnp.zeros((), jnp.float32)
    for slot in range(s.top_k):
        weight = routing.topk_weights[:, slot, None]
        total += weight * wire[routing.place[:, slot]].astype(jnp.float32)
    return total.astype(y.dtype)


def _check(case: Case, grouped: Grouped, out: Array) -> None:
    """The same rows bit by bit, where there are any, and the right sums."""
    x, _, sizes, right = expected(case)

    def compare(x: Array, y: Array, sizes: Array, out: Array, right: Array) -> Any:
        filled = jnp.arange(x.shape[0]) < sizes.sum()
        out, right = out.astype(jnp.float32), right.astype(jnp.float32)
        error = jnp.linalg.norm(out - right) / jnp.linalg.norm(right)
        return ((x != y).any(1) & filled).sum()[None], error[None]

    rows, error = prepare(case.mesh, {"": (compare, grouped.x, x, sizes, out, right)})[""]()
    if rows.sum() or not error.max() <= MAX_RELATIVE_ERROR:
        raise AssertionError(f"{int(rows.sum())} wrong rows, sums off by {float(error.max())}")


def measure(into: Json, case: Case, scale: Scale, name: str) -> None:
    """Dispatch, combine and round trip of one way."""
    slow = name == RAGGED
    if slow and (error := ragged_all_to_all_error(case.mesh)):
        raise NotImplementedError(error)
    way = Way(_ragged_dispatch, _ragged_combine) if slow else WAYS[name]
    dispatch = functools.partial(way.dispatch, case.shape)
    combine = functools.partial(way.combine, case.shape)

    def round_trip(*inputs: Array) -> Array:
        d = dispatch(*inputs)
        # Stands for the experts: without it XLA would never make the grouped rows.
        return combine(d, lax.optimization_barrier(d.x))

    runs = prepare(
        case.mesh,
        {"dispatch": (dispatch, *case.inputs), "round_trip": (round_trip, *case.inputs)},
    )
    grouped = runs["dispatch"]()
    runs |= prepare(case.mesh, {"combine": (combine, grouped, grouped.x)})
    _check(case, grouped, runs["round_trip"]())
    calls, batches = (scale.slow_calls, 2) if slow else (scale.calls, scale.batches)
    for kind, run in runs.items():
        into[kind] = summary(batch_times(run, calls, batches))


PEERS = (*WAYS, RAGGED)
"""By name. ``ragged_all_to_all`` last: it is slow."""


def best(peers: Json, kind: str) -> float:
    """The fastest peer's median."""
    return float(np.min([p[kind]["p50"] for p in peers.values() if kind in p], initial=np.inf))
