# SPDX-License-Identifier: Apache-2.0
"""The results as a picture: cost against rows, against ranks, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import plot
from benchmarks.results import Json
from jax_smfree.bench.cases import FLOOR, LIBRARY, PEERS, PHASES

ROWS, RANKS = 1024, 4  # what is held fixed where the other one varies
STYLES = {
    LIBRARY: (plot.OURS, "o", "-", 2.4),
    **{n: (c, m, "-", 1.3) for n, c, m in zip(PEERS, plot.PEERS, "s^D", strict=False)},
    FLOOR: ("#6f6f6f", None, "--", 1.3),
}


def _curves(axes: Axes, cases: list[Json], against: str) -> None:
    cases = sorted(cases, key=lambda case: case[against])
    x = [case[against] for case in cases]
    for name, (colour, marker, style, width) in STYLES.items():
        times = [case["times_us"][name] for case in cases]
        low, middle, high = ([t[p] / 1e3 for t in times] for p in ("p10", "median", "p90"))
        label = "memcpy of the same bytes" if name == FLOOR else name
        axes.plot(x, middle, style, marker=marker, ms=4.5, lw=width, color=colour, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    axes.set(xscale="log", xlabel=against, ylabel="round trip, ms")
    axes.set_xticks(x, [f"{tick:,}" for tick in x])
    axes.xaxis.minorticks_off()
    plot.log_times(axes)


def _phases(cases: list[Json]) -> Iterator[list[plot.Phase]]:
    """Per rank, so that the columns compare; the floor is each phase's share of the memcpy."""
    for case in cases:
        times, moved, unit = case["times_us"], case["bytes"], 1e3 * case["ranks"]
        per_byte = times[FLOOR]["median"] / sum(moved.values())
        yield [plot.Phase(times[p]["median"] / unit, moved[p] * per_byte / unit) for p in PHASES]


def save(result: Json, path: Path) -> None:
    """Of float32 and one process only."""
    cases = [c for c in result["cases"] if c["dtype"] == "float32" and c["processes"] == 1]
    routings = sorted({(c["top_k"], c["experts"]) for c in cases})
    figure, grid = plt.subplots(
        len(routings), 3, figsize=(12.5, 3.7 * len(routings)), squeeze=False, layout="constrained"
    )
    for (top_k, experts), axes in zip(routings, grid, strict=True):
        here = [c for c in cases if (c["top_k"], c["experts"]) == (top_k, experts)]
        ranks = RANKS if any(c["ranks"] == RANKS for c in here) else here[0]["ranks"]
        rows = ROWS if any(c["rows"] == ROWS for c in here) else here[0]["rows"]
        of_rows = sorted((c for c in here if c["rows"] == rows), key=lambda case: case["ranks"])
        _curves(axes[0], [c for c in here if c["ranks"] == ranks], "rows")
        axes[0].set(xlabel="rows per rank", title=f"top-{top_k} of {experts}, {ranks} ranks")
        _curves(axes[1], of_rows, "ranks")
        axes[1].set_title(f"top-{top_k} of {experts}, {rows:,} rows per rank")
        plot.phases(axes[2], list(_phases(of_rows)))
        axes[2].set_xticks(range(len(of_rows)), [str(case["ranks"]) for case in of_rows])
        axes[2].set(xlabel="ranks", ylabel="ms per rank")
        axes[2].set_title("phases, and a memcpy of their bytes (pale)")
    grid[0][0].legend(frameon=False, fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"Expert-parallel dispatch and combine on {machine['cores']} cores of {machine['cpu']}: "
        f"hidden {cases[0]['hidden']}, float32 (jax {machine['jax']}, {machine['date'][:10]})",
        fontsize=11,
    )
    plot.save(figure, path)
