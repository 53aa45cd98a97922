# SPDX-License-Identifier: Apache-2.0
"""JAX's own ways on the GPUs: those of ``jax_smfree.bench``, and ``benchmarks/ragged_way.py``."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from benchmarks.gpu.cases import Case, Scale
from benchmarks.gpu.library import expected
from benchmarks.gpu.timing import batch_times, prepare, summary
from benchmarks.ragged_way import RAGGED_WAY, ragged_all_to_all_error
from benchmarks.results import Json
from jax_smfree.bench.jax_ways import WAYS, Grouped

RAGGED = "ragged_all_to_all"
PEERS = {**WAYS, RAGGED: RAGGED_WAY}
"""By name. ``ragged_all_to_all`` last: it is slow."""
# Rounded to bfloat16 once or twice, in another order.
MAX_RELATIVE_ERROR = 1e-2


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
    way = PEERS[name]
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
