# SPDX-License-Identifier: Apache-2.0
"""Forward and backward pass with enough compute to hide behind: what is left of communication."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array, lax

from benchmarks.gpu.cases import Case, Scale
from benchmarks.gpu.library import Library
from benchmarks.gpu.timing import Gemms, prepare, summary, timed
from benchmarks.results import Json
from jax_smfree.bench.overlapped import exchange_around, products

GEMMS = 2  # around each of dispatch and combine


def _computing(a: Array, w: Array) -> Array:
    """The same compute, between barriers at the same places."""
    for _ in range(2):
        a, w_here = lax.optimization_barrier((a, w))
        a = lax.optimization_barrier(products(GEMMS, a, w_here))
    return a


def measure(into: Json, case: Case, scale: Scale, gemms: Gemms, **options: Any) -> None:
    with Library(case, scale, differentiable=True, **options) as library:

        def together(x: Array, topk_idx: Array, topk_weights: Array, a: Array, w: Array) -> Any:
            def layer(x: Array, topk_weights: Array, a: Array, w: Array) -> tuple[Array, Array]:
                return exchange_around(library.group, GEMMS, x, topk_idx, topk_weights, a, w)

            results, pull = jax.vjp(layer, x, topk_weights, a, w)
            return results, pull((x, a))

        def alone(a: Array, w: Array) -> Any:
            result, pull = jax.vjp(_computing, a, w)
            return result, pull(a)

        runs = prepare(case.mesh, {"alone": (alone, gemms.a, gemms.w)})
        runs |= prepare(case.mesh, {"together": (together, *case.inputs, gemms.a, gemms.w)})
        for name, run in runs.items():
            into[name] = timed(run, scale)
        left = into["together"]["p50"] - into["alone"]["p50"]
        into["left_per_direction_us"] = round(left / 2, 2)
        if library.tracer:
            recordings = library.record(runs["together"])
            for name, mirrored in (("forward", False), ("backward", True)):
                into[f"{name}_phases"] = summary([r.total_us(mirrored) for r in recordings])
