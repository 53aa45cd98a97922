# SPDX-License-Identifier: Apache-2.0
"""Predictions as a picture: times and memory by the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jax_smfree.plan import Prediction

_COLOURS = {"direct": "#1f5fa8", "hierarchical": "#2e8b74"}


def save(predictions: Sequence[Prediction], path: Path, title: str) -> None:
    """Writes it; the ending of ``path`` says which kind of file."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for mode, colour in _COLOURS.items():
        mine = [p for p in predictions if p.mode == mode]
        ranks = [p.ranks for p in mine]
        if not mine:
            continue
        wire = [p.wire_us / 1e3 for p in mine]
        busy = [(p.sm_us + 2 * p.forward_us) / 1e3 for p in mine]
        times.plot(ranks, wire, "o-", color=colour, label=f"{mode}: on the wire, can be hidden")
        times.plot(ranks, busy, "s--", color=colour, label=f"{mode}: on the SMs, stays")
        memory.plot(ranks, [p.buffer_bytes / 2**30 for p in mine], "o-", color=colour, label=mode)
    times.set(xlabel="ranks", ylabel="ms", title="one dispatch on the wire; all phases")
    memory.set(xlabel="ranks", ylabel="GiB per rank", title="buffers")
    shown = sorted({p.ranks for p in predictions})
    for axes in (times, memory):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(shown, [str(number) for number in shown])
        axes.minorticks_off()
        axes.grid(color="#e3e3e3", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
