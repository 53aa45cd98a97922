# SPDX-License-Identifier: Apache-2.0
"""The table of ``jax-smfree plan`` as a picture: times and memory by the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from jax_smfree.cli.plan import Line

_COLOURS = {"direct": "#1f5fa8", "hierarchical": "#2e8b74"}
# The columns that are drawn: how, and what they are called there.
_TIMES = {
    "wire ms": ("o-", "on the wire, can be hidden"),
    "SM ms": ("s--", "on the SMs, stays"),
    "relay ms": ("^:", "inside the node, a phase waits"),
}


def draw(lines: Sequence[Line], title: str) -> Figure:
    """Draws the numbers of the table; a column is left out where it is empty."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for mode, colour in _COLOURS.items():
        mine = [line for line in lines if line.mode == mode]
        for column, (style, meaning) in _TIMES.items():
            points = [(line.ranks, line.numbers[column]) for line in mine]
            if any(y for _, y in points):
                times.plot(
                    *zip(*points, strict=True), style, color=colour, label=f"{mode}: {meaning}"
                )
        if mine:
            points = [(line.ranks, line.numbers["memory GiB"]) for line in mine]
            memory.plot(*zip(*points, strict=True), "o-", color=colour, label=mode)
    times.set(xlabel="ranks", ylabel="ms", title="one dispatch on the wire; all phases")
    memory.set(xlabel="ranks", ylabel="GiB per rank", title="buffers")
    shown = sorted({line.ranks for line in lines})
    for axes in (times, memory):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(shown, [str(number) for number in shown])
        axes.minorticks_off()
        axes.grid(color="#e3e3e3", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


def save(lines: Sequence[Line], path: Path, title: str) -> None:
    """Writes it; the ending of ``path`` says which kind of file."""
    draw(lines, title).savefig(path, dpi=130)
