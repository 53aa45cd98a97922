# SPDX-License-Identifier: Apache-2.0
"""What the pictures of CPUs and GPUs have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_smfree.inspect.timeline_plot import PHASE_COLOURS

OURS = "#1f5fa8"
PEERS = ("#c44e2b", "#e08f3c", "#8a5fa8", "#a9a9a9")


class Phase(NamedTuple):
    """What a phase took, and what its bytes take at the rate of a copy."""

    took: float
    floor: float


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def log_times(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.grid(axis="y", color="#e3e3e3", lw=0.7)
    bare(axes)


def phases(axes: Axes, columns: Sequence[Sequence[Phase | None]]) -> None:
    """Columns of the four phases, one on the other, each beside its floors (pale)."""
    for at, column in enumerate(columns):
        top = floor = 0.0
        for (name, colour), phase in zip(PHASE_COLOURS.items(), column, strict=True):
            if phase:
                label = name.replace("_", " ") if at == 0 else None
                axes.bar(at - 0.2, phase.took, 0.38, top, color=colour, label=label)
                axes.bar(at + 0.2, phase.floor, 0.34, floor, color=colour, alpha=0.35)
                top, floor = top + phase.took, floor + phase.floor
    if axes.patches:
        axes.legend(frameon=False, fontsize=7.5, reverse=True)
    axes.margins(y=0.2)
    bare(axes)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"wrote {path}")
