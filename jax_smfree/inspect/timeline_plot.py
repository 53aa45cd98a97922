# SPDX-License-Identifier: Apache-2.0
"""`Timeline` as a picture. Needs matplotlib: ``pip install 'jax_smfree[cli]'``."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jax_smfree.inspect.timeline import Record, Timeline, rank_of

PHASE_COLOURS = {
    "dispatch_send": "#1f5fa8",
    "dispatch_recv": "#5b92cf",
    "combine_send": "#2e8b74",
    "combine_recv": "#7cc2ae",
}
WIRE_COLOUR, COMPUTE_COLOUR = "#c44e2b", "#d9d9d9"


def draw(axes: Axes, timeline: Timeline, title: str = "", *, compute: bool = True) -> None:
    """Draws phases of every rank as thick bars, copies to each peer as thin ones below them.

    ``compute`` fills the time from a send to the recv after it, which is free for compute.
    """
    ranks = timeline.ranks
    for row, rank in enumerate(ranks):
        mine = [p for p in timeline.phases if rank_of(p) == rank]
        mine.sort(key=lambda p: p["begin_ns"])
        for before, after in itertools.pairwise(mine) if compute else ():
            if before["phase"].endswith("_send") and after["phase"].endswith("_recv"):
                gap = {**before, "begin_ns": before["end_ns"], "end_ns": after["begin_ns"]}
                axes.broken_barh([_ms(timeline, gap)], (row + 0.1, 0.36), color=COMPUTE_COLOUR)
        for phase in mine:
            colour = PHASE_COLOURS[phase["phase"]]
            axes.broken_barh([_ms(timeline, phase)], (row + 0.1, 0.36), color=colour)
        copies = [w for w in timeline.wire if rank_of(w) == rank]
        peers = sorted({w["peer"] for w in copies})
        for copy in copies:
            top = row + 0.5 + 0.4 * peers.index(copy["peer"]) / len(peers)
            axes.broken_barh([_ms(timeline, copy)], (top, 0.3 / len(peers)), color=WIRE_COLOUR)
    names = [f"rank {rank}" if replica == 0 else f"{replica}/{rank}" for replica, rank in ranks]
    axes.set_yticks([row + 0.5 for row in range(len(ranks))], names)
    axes.invert_yaxis()
    clock = "" if timeline.has_one_clock else "each rank from its own start"
    axes.set(title="; ".join(filter(None, (title, clock))), xlabel="ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def legend(figure: Figure, *, wire: bool, compute: bool = True) -> None:
    """Explains the colours of `draw` below all axes."""
    colours = {name.replace("_", " "): colour for name, colour in PHASE_COLOURS.items()}
    colours |= {"free for compute": COMPUTE_COLOUR} if compute else {}
    colours |= {"copy to a peer": WIRE_COLOUR} if wire else {}
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, ncols=len(handles), loc="outside lower center")


def save(timeline: Timeline, path: Path, title: str = "") -> None:
    """Writes a picture; the ending of ``path`` says which kind."""
    height = 1.6 + 0.9 * len(timeline.ranks)
    figure = Figure(figsize=(11, height), layout="constrained")
    draw(figure.subplots(), timeline, title)
    legend(figure, wire=bool(timeline.wire))
    figure.savefig(path, dpi=130)


def _ms(timeline: Timeline, record: Record) -> tuple[float, float]:
    begin_us, duration_us = timeline.span_us(record)
    return begin_us / 1e3, duration_us / 1e3
