# SPDX-License-Identifier: Apache-2.0
"""The results as a picture: cost against rows, against ranks, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from jax_smfree.bench.cases import FLOOR, LIBRARY, PHASES

Case = dict[str, Any]

ROWS, RANKS = 1024, 4  # what is held fixed where the other one varies
LINES = {
    LIBRARY: ("#1f5fa8", "o", "-", 2.4),
    "all_gather": ("#c44e2b", "s", "-", 1.3),
    "all_gather+slots": ("#e08f3c", "^", "-", 1.3),
    "all_to_all": ("#8a5fa8", "D", "-", 1.3),
    FLOOR: ("#6f6f6f", None, "--", 1.3),
}
PHASE_COLOURS = ("#1f5fa8", "#5b92cf", "#2e8b74", "#7cc2ae")


def _curves(axes: Axes, cases: list[Case], against: str) -> None:
    cases = sorted(cases, key=lambda case: case[against])
    for name, (colour, marker, style, width) in LINES.items():
        times = [case["times_us"][name] for case in cases]
        x = [case[against] for case in cases]
        middle = [t["median"] / 1e3 for t in times]
        label = "memcpy of the same bytes" if name == FLOOR else name
        axes.plot(x, middle, style, marker=marker, ms=4.5, lw=width, color=colour, label=label)
        low, high = ([t[p] / 1e3 for t in times] for p in ("p10", "p90"))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    axes.set(xscale="log", yscale="log", xlabel=against, ylabel="round trip, ms")
    ticks = sorted({case[against] for case in cases})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))


def _bars(axes: Axes, cases: list[Case]) -> None:
    """Each phase next to its share of the memcpy, by rank count."""
    cases = sorted(cases, key=lambda case: case["ranks"])
    for at, case in enumerate(cases):
        times, moved = case["times_us"], case["bytes"]
        unit = 1e3 * case["ranks"]  # ms per rank, so that the bars compare
        floor_per_byte = times[FLOOR]["median"] / sum(moved.values())
        bottom = floor = 0.0
        for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
            took = times[phase]["median"] / unit
            least = moved[phase] * floor_per_byte / unit
            axes.bar(at - 0.2, took, 0.38, bottom, color=colour, label=phase if at == 0 else None)
            axes.bar(at + 0.2, least, 0.34, floor, color=colour, alpha=0.35)
            bottom, floor = bottom + took, floor + least
        axes.annotate("memcpy", (at + 0.2, floor), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(cases)), [f"{case['ranks']}" for case in cases])
    axes.set(xlabel="ranks", ylabel="the four phases, ms per rank")
    axes.legend(frameon=False, fontsize=7.5, reverse=True, ncols=2, loc="upper left")
    axes.margins(y=0.2)


def save(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG; float32 and one process only."""
    cases = [c for c in result["cases"] if c["dtype"] == "float32" and c["processes"] == 1]
    routings = sorted({(c["top_k"], c["experts"]) for c in cases})
    figure, grid = plt.subplots(
        len(routings), 3, figsize=(12.5, 3.7 * len(routings)), squeeze=False, layout="constrained"
    )
    for (top_k, experts), axes in zip(routings, grid, strict=True):
        here = [c for c in cases if (c["top_k"], c["experts"]) == (top_k, experts)]
        ranks = RANKS if any(c["ranks"] == RANKS for c in here) else here[0]["ranks"]
        rows = ROWS if any(c["rows"] == ROWS for c in here) else here[0]["rows"]
        of_rows = [c for c in here if c["rows"] == rows]
        _curves(axes[0], [c for c in here if c["ranks"] == ranks], "rows")
        axes[0].set_xlabel("rows per rank")
        axes[0].set_title(f"top-{top_k} of {experts}, {ranks} ranks")
        _curves(axes[1], of_rows, "ranks")
        axes[1].set_title(f"top-{top_k} of {experts}, {rows:,} rows per rank")
        _bars(axes[2], of_rows)
        axes[2].set_title("phases, and a memcpy of their bytes")
        for each in axes:
            each.grid(axis="y", color="#e3e3e3", lw=0.7)
            each.set_axisbelow(True)
            each.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8)
    machine, hidden = result["machine"], cases[0]["hidden"]
    figure.suptitle(
        f"Expert-parallel dispatch and combine on {machine['cores']} cores of {machine['cpu']}: "
        f"hidden {hidden}, float32 (jax {machine['jax']}, {machine['date'][:10]})",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
