# SPDX-License-Identifier: Apache-2.0
"""How programs are compiled and timed on GPUs, and the rates that the rest is compared with."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.gpu.cases import Scale, random_rows
from benchmarks.results import Json
from jax_smfree.bench.overlapped import products
from jax_smfree.bench.programs import compiled

Run = Callable[[], Any]
GEMM_COUNTS = (1, 2, 3)


def summary(samples: Sequence[float]) -> Json:
    p10, p50, p90 = np.percentile(samples, [10, 50, 90])
    return {
        "p10": round(float(p10), 2),
        "p50": round(float(p50), 2),
        "p90": round(float(p90), 2),
        "samples": len(samples),
    }


def prepare(mesh: Mesh, programs: Mapping[str, tuple[Any, ...]]) -> dict[str, Run]:
    """Compiles ``{name: (function, *arguments)}`` side by side and binds the arguments."""
    lowered = [compiled(f, mesh).lower(*args) for f, *args in programs.values()]
    with ThreadPoolExecutor() as pool:
        executables = list(pool.map(lambda each: each.compile(), lowered))
    return {
        name: functools.partial(executable, *args)
        for (name, (_, *args)), executable in zip(programs.items(), executables, strict=True)
    }


def batch_times(run: Run, calls: int, batches: int) -> list[float]:
    """Microseconds per call, of calls back to back; one sample per batch."""
    for _ in range(3):  # XLA records command buffers at the second execution
        jax.block_until_ready(run())
    samples = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - start) / calls * 1e6)
    return samples


def turn_us(run: Run, turn_s: float, wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Microseconds per call, of calls back to back that take about ``turn_s``, after one more."""

    def once(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        wait(result)
        return (time.perf_counter() - start) / calls

    return 1e6 * once(max(1, round(turn_s / once(1))))


def by_turns(runs: Mapping[str, Run], turn_s: float, rounds: int) -> dict[str, Json]:
    """Of each one a turn, and again: the clock of a busy GPU falls, and falls for all of them."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(turn_us(run, turn_s))
    return {name: summary(times) for name, times in samples.items()}


def timed(run: Run, scale: Scale) -> Json:
    return summary(batch_times(run, scale.calls, scale.batches))


def launch(into: Json, mesh: Mesh, scale: Scale) -> None:
    """A program that does next to nothing: no other program can take less."""
    operand = random_rows(mesh, (mesh.size, 8), 0)
    into.update(timed(prepare(mesh, {"": (lambda x: -x, operand)})[""], scale))


def copy_rate(into: Json, mesh: Mesh, scale: Scale) -> None:
    """GB/s, bytes read plus bytes written, on all GPUs at once: the byte floors are made of it.

    XLA copies with the driver's copy and negates with a kernel of its own; the faster one counts.
    """
    x = random_rows(mesh, (mesh.size, scale.copy_bytes // 2), 0)
    programs = prepare(mesh, {"copy": (jnp.copy, x), "negate": (jnp.negative, x)})
    for name, run in programs.items():
        times = timed(run, scale)
        into[name] = {**times, "gb_s": round(2e-3 * scale.copy_bytes / times["p50"], 1)}
    into["gb_s"] = max(into[name]["gb_s"] for name in programs)


class Gemms:
    """Chains of large matrix products, the compute that the rows hide behind."""

    def __init__(self, mesh: Mesh, scale: Scale) -> None:
        self._mesh, self._scale = mesh, scale
        shape = (mesh.size * scale.gemm, scale.gemm)
        # Variance 1 / size, so that a chain neither grows nor dies.
        self.a = random_rows(mesh, shape, 1)
        self.w = random_rows(mesh, shape, 2, scale.gemm**-0.5)

    def measure(self, into: Json) -> None:
        """One product. XLA chooses its kernel by timing some, and the chains find what it chose."""
        run = prepare(self._mesh, {"": (functools.partial(products, 1), self.a, self.w)})[""]
        into["size"], into["1"] = self._scale.gemm, timed(run, self._scale)
        into["tflop_s"] = round(2e-6 * self._scale.gemm**3 / into["1"]["p50"], 1)
