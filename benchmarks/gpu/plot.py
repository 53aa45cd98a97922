# SPDX-License-Identifier: Apache-2.0
"""The results as pictures: whole calls and phases, and what ran when."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import plot
from benchmarks.gpu.measures import COPY_ENGINE, DEFAULT
from benchmarks.gpu.report import CALLS, overlap_entries
from benchmarks.gpu.trace import KERNELS
from benchmarks.report import find
from benchmarks.results import Json
from jax_smfree.inspect import Timeline, timeline_plot

TOGETHER, GEMM = "#c44e2b", "#d9d9d9"


def _by_shape(axes: Axes, result: Json, title: str, ylabel: str) -> None:
    axes.set(title=title, ylabel=ylabel)
    axes.set_xticks(range(len(result["shapes"])), list(result["shapes"]), fontsize=8, rotation=12)
    plot.bare(axes)


def _bars(axes: Axes, series: list[tuple[str, str, list[Json | None]]]) -> None:
    """Name, colour and times by shape; the whiskers are the 10th and 90th percentile."""
    width = 0.8 / len(series)
    for at, (name, colour, times) in enumerate(series):
        for group, each in enumerate(times):
            if each:
                low, middle, high = (each[p] / 1e3 for p in ("p10", "p50", "p90"))
                x = group + (at - (len(series) - 1) / 2) * width
                spread = [[middle - low], [high - middle]]
                axes.bar(x, middle, width * 0.92, yerr=spread, color=colour, ecolor="#333333")
                axes.annotate(
                    f" {middle:.2f}", (x, high), ha="center", va="bottom", fontsize=7, rotation=90
                )
        axes.bar(0, 0, color=colour, label=name)
    plot.log_times(axes)
    axes.autoscale_view()
    middles = [each["p50"] / 1e3 for _, _, times in series for each in times if each]
    if middles:
        axes.set_ylim(min(middles) / 3, max(middles) * 4)


def _whole_calls(axes: Axes, result: Json, call: str) -> None:
    shapes = list(result["shapes"].values())
    peers = list(dict.fromkeys(name for shape in shapes for name in shape["peers"]))
    ours = [find(s, "movers", DEFAULT, "native", call) for s in shapes]
    series = [("jax_smfree", plot.OURS, ours)]
    for name, colour in zip(peers, plot.PEERS, strict=False):
        series.append((name, colour, [find(s, "peers", name, call) for s in shapes]))
    _bars(axes, series)
    _by_shape(axes, result, call.replace("_", " "), "ms")


def _layers(axes: Axes, result: Json) -> None:
    shapes = result["shapes"].values()
    sides = (("jax_smfree", plot.OURS), ("all_gather", plot.PEERS[0]))
    _bars(axes, [(name, colour, [find(s, "moe", name) for s in shapes]) for name, colour in sides])
    _by_shape(axes, result, "MoE layer, forward and backward", "ms")


def _phases(axes: Axes, result: Json) -> None:
    """Each phase beside what its bytes take at the copy rate."""
    columns = []
    for shape in result["shapes"].values():
        found = [find(shape, "movers", DEFAULT, "phases", phase) for phase in KERNELS]
        columns.append([f and plot.Phase(f["p50"], f["floor_us"]) for f in found])
    plot.phases(axes, columns)
    _by_shape(axes, result, "phases on the SMs, and a copy of their bytes (pale)", "µs")


def _overlap(axes: Axes, result: Json) -> None:
    """Of the first shape: GEMMs alone, the phases, and what else communication adds."""
    shape = next(iter(result["shapes"].values()))
    entries = [(kind, e) for kind in ("dispatch", "both") for e in overlap_entries(shape, kind)]
    parts = (("alone_us", GEMM, "GEMMs alone"), ("phases_us", plot.OURS, "phases"))
    for at, (_, entry) in enumerate(entries):
        top = 0.0
        for key, colour, label in parts:
            height = entry.get(key, 0.0) / 1e3
            axes.bar(at, height, 0.6, top, color=colour, label=label if at == 0 else None)
            top += height
        together = entry["together"]["p50"] / 1e3
        axes.hlines(
            together, at - 0.38, at + 0.38, color=TOGETHER, label="together" * (at == 0) or None
        )
    axes.set_xticks(range(len(entries)), [f"{k}\n{e['gemms']}" for k, e in entries], fontsize=8)
    axes.set(title="GEMMs around dispatch, and around both", ylabel="ms", xlabel="GEMMs each")
    if entries:
        axes.legend(frameon=False, fontsize=8)
    plot.bare(axes)


def save(result: Json, path: Path) -> None:
    """PNGs beside ``path``."""
    if not result["shapes"]:
        return
    machine = result["machine"]
    title = (
        f"Expert-parallel dispatch and combine on {result['ranks']} × {machine['device']} "
        f"(bfloat16, jax {machine['jax']}, {machine['date'][:10]})"
    )
    figure, grid = plt.subplots(3, 2, figsize=(11, 12), layout="constrained")
    calls, (phases, overlap, layers) = grid.flat[:3], grid.flat[3:]
    for axes, call in zip(calls, CALLS, strict=True):
        _whole_calls(axes, result, call)
    colours = calls[0].get_legend_handles_labels()
    figure.legend(*colours, ncols=len(colours[0]), loc="outside lower center")
    _phases(phases, result)
    _overlap(overlap, result)
    _layers(layers, result)
    figure.suptitle(title, fontsize=12)
    plot.save(figure, path.with_suffix(".png"))

    name, shape = next(iter(result["shapes"].items()))
    native = find(shape, "movers", DEFAULT, "native", "timeline")
    hidden = find(shape, "movers", COPY_ENGINE, "overlap", "timeline")
    if native and hidden:
        figure, axes = plt.subplots(2, 1, figsize=(11, 6.2), layout="constrained")
        native, hidden = map(Timeline.from_json, (native, hidden))
        timeline_plot.draw(axes[0], native, f"{name}, one call each", compute=False)
        timeline_plot.draw(axes[1], hidden, f"{name}, GEMMs between send and recv")
        timeline_plot.legend(figure, wire=bool(native.wire))
        plot.save(figure, path.with_name(f"{path.stem}-timeline.png"))
