# SPDX-License-Identifier: Apache-2.0
"""The result of ``jax-smfree bench`` as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_smfree.bench.cases import COMPUTE, LIBRARY, PEERS, PHASES, TOGETHER
from jax_smfree.inspect.timeline_plot import COMPUTE_COLOUR, PHASE_COLOURS

_OURS, _PEERS = "#1f5fa8", "#c44e2b"


def save(result: dict[str, Any], path: Path, title: str) -> None:
    """Writes it; the ending of ``path`` says which kind of file."""
    times = result["times_us"]
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    phases, round_trips, overlap = figure.subplots(1, 3)

    _bars(phases, times, dict(zip(PHASES, PHASE_COLOURS.values(), strict=True)))
    phases.set(title="phases, one program each", ylabel="ms")
    _bars(round_trips, times, {LIBRARY: _OURS} | dict.fromkeys(PEERS, _PEERS))
    round_trips.set(title="dispatch and combine")
    _overlap(overlap, times)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _bars(axes: Axes, times: dict[str, Any], colours: dict[str, str]) -> None:
    """Medians; the whiskers are the 10th and 90th percentile."""
    for at, (name, colour) in enumerate(colours.items()):
        low, middle, high = (times[name][p] / 1e3 for p in ("p10", "median", "p90"))
        axes.bar(at, middle, 0.7, yerr=[[middle - low], [high - middle]], color=colour)
    names = [name.replace(" ", "\n").replace("_", "_\n") for name in colours]
    axes.set_xticks(range(len(colours)), names, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _overlap(axes: Axes, times: dict[str, Any]) -> None:
    """One after the other, as stacked bars, against both at the same time."""
    compute, exchange, together = (
        times[name]["median"] / 1e3 for name in (COMPUTE, LIBRARY, TOGETHER)
    )
    axes.bar(0, compute, 0.6, color=COMPUTE_COLOUR, label="compute alone")
    axes.bar(0, exchange, 0.6, compute, color=_OURS, label="dispatch and combine alone")
    axes.bar(1, min(compute, together), 0.6, color=COMPUTE_COLOUR)
    axes.bar(1, max(0.0, together - compute), 0.6, compute, color=_OURS, alpha=0.5)
    axes.set_xticks([0, 1], ["one after\nthe other", "overlapped"], fontsize=8)
    axes.set(title="what compute hides")
    axes.margins(y=0.25)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
