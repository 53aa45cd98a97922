# SPDX-License-Identifier: Apache-2.0
"""The pictures of a training run: the loss, and how busy the experts are."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

BLUE, ORANGE, GREY = "#2a6fbb", "#d9742b", "#767676"
UNIFORM_LOSS = float(np.log(256))
plt.rcParams.update(
    {
        "figure.dpi": 150,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
)


def save_loss_curve(
    path: pathlib.Path, losses: ArrayLike, held_out: list[tuple[int, float]], subtitle: str
) -> None:
    """Training loss per step, and the held-out loss at some steps."""
    losses = np.asarray(losses)
    steps = np.arange(1, losses.size + 1)
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    axes.axhline(UNIFORM_LOSS, color=GREY, linewidth=1, linestyle=":")
    axes.annotate(
        "all bytes equally likely", (losses.size, UNIFORM_LOSS), (0, 4), color=GREY,
        textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip
    axes.plot(steps, losses, color=BLUE, linewidth=0.7, alpha=0.4, label="training, each batch")
    window = max(1, losses.size // 20)
    if losses.size > window:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        label = f"training, mean of {window} batches"
        axes.plot(steps[window - 1 :], smooth, color=BLUE, linewidth=1.8, label=label)
    axes.plot(*zip(*held_out, strict=True), "o", color=ORANGE, label="held-out files")
    last_step, last_loss = held_out[-1]
    axes.annotate(
        f"{last_loss:.2f}", (last_step, last_loss), (0, -16), color=ORANGE,
        textcoords="offset points", ha="center",
    )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(0, 6.2))
    _title(axes, "Byte-level MoE transformer on the Python standard library", subtitle)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.88))
    figure.savefig(path)
    plt.close(figure)


def save_expert_load(path: pathlib.Path, loads: ArrayLike, top_k: int, subtitle: str) -> None:
    """``loads`` [steps, layers, E]: the share of rows of each expert, over time, per layer."""
    loads = np.asarray(loads, np.float64)
    share = top_k * loads / loads.sum(axis=-1, keepdims=True)  # of the rows that visit the expert
    steps, layers, experts = share.shape
    balanced = top_k / experts
    figure, (maps, worst) = plt.subplots(
        2, layers, figsize=(7.6, 4.6), layout="constrained", sharex=True, sharey="row",
        squeeze=False, gridspec_kw={"height_ratios": [3, 2]},
    )  # fmt: skip
    for layer in range(layers):
        image = maps[layer].imshow(
            100 * share[:, layer].T, aspect="auto", interpolation="nearest", cmap="viridis",
            vmin=0, vmax=200 * balanced, extent=(0.5, steps + 0.5, experts - 0.5, -0.5),
        )  # fmt: skip
        maps[layer].set_title(f"layer {layer}")
        maps[layer].grid(False)
        busiest = share[:, layer].max(axis=-1) / balanced
        worst[layer].plot(np.arange(1, steps + 1), busiest, color=BLUE, linewidth=1)
        worst[layer].axhline(1, color=GREY, linewidth=1, linestyle=":")
        worst[layer].set(xlabel="step", ylim=(0, experts / top_k))
    maps[0].set(ylabel="expert", yticks=range(0, experts, max(1, experts // 8)))
    worst[0].set_ylabel("busiest expert\n÷ average")
    bar = figure.colorbar(image, ax=list(maps), extend="max", pad=0.02)
    bar.set_label(f"rows that visit it (%, {100 * balanced:.3g} is even)")
    figure.suptitle(f"How busy the experts are  ({subtitle})", x=0.01, ha="left", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def _title(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, pad=20)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color=GREY, fontsize=9)
