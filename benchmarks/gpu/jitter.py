# SPDX-License-Identifier: Apache-2.0
"""How evenly round trips of few rows follow one another, and what the movers' threads take of it.

A mover looks for work without pause for 2 ms after an operation, then it naps ever longer, at most
1 ms. So it is measured back to back, and with pauses in which it falls asleep.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.gpu.cases import Case, Scale
from benchmarks.gpu.library import Library
from benchmarks.gpu.measures import COPY_ENGINE, MOVERS, SM_PUSH
from benchmarks.gpu.timing import Run, prepare
from benchmarks.gpu.trace import KERNELS
from benchmarks.report import number
from benchmarks.results import Json

STEPS, STEPS_WITH_PAUSES = 10_000, 1_000
PAUSE_S = 5e-3
AT_ONCE = 30  # steps that the library's trace holds
PERCENTILES = (50, 99, 100)
HEADER = ["mover", "steps", *("longest" if p == 100 else f"p{p}" for p in PERCENTILES), "cores"]


def measure(into: Json, case: Case, scale: Scale, smoke: bool) -> None:
    """Microseconds of device time, and how many cores the movers keep busy."""
    for mover in (SM_PUSH, COPY_ENGINE):
        with Library(case, scale, **MOVERS[mover]) as library:
            run = prepare(case.mesh, {"": (library.round_trip, *case.inputs)})[""]
            for name, steps, pause_s in (
                ("back to back", STEPS, 0.0),
                (f"{PAUSE_S * 1e3:g} ms apart", STEPS_WITH_PAUSES, PAUSE_S),
            ):
                into[f"{mover}, {name}"] = _spread(
                    library, run, AT_ONCE if smoke else steps, pause_s
                )
            library.group.check()


def _spread(library: Library, run: Run, steps: int, pause_s: float) -> Json:
    for _ in range(3):  # XLA records command buffers at the second execution
        jax.block_until_ready(run())
    times: list[float] = []
    wall_s = busy_s = 0.0
    while len(times) < steps:
        began, busy_before = time.monotonic(), _mover_seconds()
        for _ in range(AT_ONCE):
            result = run()
            if pause_s:
                jax.block_until_ready(result)
                time.sleep(pause_s)
        jax.block_until_ready(result)
        busy_s += _mover_seconds() - busy_before
        wall_s += time.monotonic() - began
        if library.tracer is None:  # on CPUs there is no device time
            return {}
        times += round_trips(library.group.trace())[-AT_ONCE:]
    found = dict(zip(map(str, PERCENTILES), np.percentile(times, PERCENTILES), strict=True))
    spread = {name: round(float(value), 2) for name, value in found.items()}
    return {"steps": len(times), **spread, "cores": round(busy_s / wall_s, 2)}


def round_trips(records: list[Json]) -> list[float]:
    """From the start of each dispatch's send to the end of the next combine's recv, in order."""
    by_rank = []
    for rank in sorted({record["rank"] for record in records}):
        mine = sorted((r for r in records if r["rank"] == rank), key=lambda r: r["begin_ns"])
        begins = [r["begin_ns"] for r in mine if r["phase"] == KERNELS[0]]
        ends = [r["end_ns"] for r in mine if r["phase"] == KERNELS[-1]]
        last = min(len(begins), len(ends))
        by_rank.append((np.array(ends[-last:]) - np.array(begins[-last:])) / 1e3)
    least = min(map(len, by_rank))
    return [float(t) for t in np.max([times[-least:] for times in by_rank], axis=0)]


def _mover_seconds() -> float:
    """The processor time of this process's movers."""
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "smfree-mover":
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # in user and in kernel mode
    return ticks / os.sysconf("SC_CLK_TCK")


def rows(result: Json) -> Iterator[list[str]]:
    for name, found in result.items():
        if not isinstance(found, dict) or "steps" not in found:
            continue
        percentiles = [number(found[str(p)], 1) for p in PERCENTILES]
        yield [name, str(found["steps"]), *percentiles, number(found["cores"], 2)]
