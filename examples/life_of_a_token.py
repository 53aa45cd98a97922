# SPDX-License-Identifier: Apache-2.0
"""Draws where the rows of a small run are at every step of a dispatch and a combine.

    python examples/life_of_a_token.py --output life.png

Three ranks, four rows each, top-2 of six experts. The results of the dispatch and the combine are
those of a run on virtual CPU devices; what stands in the send and recv regions in between follows
from the routing (csrc/protocol/PROTOCOL.md), and the run is checked against it. (What a rank sends
to itself is packed straight into its recv region; it is drawn as if it went by way of a send
region.) A row has the colour of its rank and its place as a number. Follow the framed one.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import jax_smfree as smfree

RANKS, ROWS, TOP_K, EXPERTS, HIDDEN = 3, 4, 2, 6, 8
LOCAL = EXPERTS // RANKS
COLOURS = ("#5b92cf", "#7cc2ae", "#e0a458")
FOLLOWED = (0, 1)
STEPS = ("rows", "send regions", "recv regions", "d.x", "send regions", "recv regions", "out")
MARGIN = 2.8  # left of the rows, for the names of the parts; in widths of a row

Row = tuple[int, int]  # (rank, position)
Slots = list[tuple[str, list[Row]]]  # the parts of one rank's buffer, with what stands in them


@dataclasses.dataclass(frozen=True)
class Run:
    """The routing, and what came out; the rows say in every element which they are."""

    topk_idx: np.ndarray  # [R, T, K]
    grouped: list[list[Row]]  # by rank, in the order of d.x
    group_sizes: np.ndarray  # [R, E / R]
    out: np.ndarray  # [R, T] how many times its own row each row of the result is

    def experts_of(self, row: Row) -> list[int]:
        return [int(e) for e in self.topk_idx[row]]

    def sent(self, source: int, destination: int) -> list[Row]:
        """Each row once to each rank that has an expert for it, in their order."""
        rows = [(source, position) for position in range(ROWS)]
        return [r for r in rows if any(e // LOCAL == destination for e in self.experts_of(r))]


def run() -> Run:
    """Dispatches and combines rows with weight 1 for each of the K experts."""
    rng = np.random.default_rng(4)
    topk_idx = np.argsort(rng.random((RANKS * ROWS, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    names = 1 + jnp.arange(RANKS * ROWS, dtype=jnp.float32)
    x = jnp.tile(names[:, None], (1, HIDDEN))
    mesh = Mesh(jax.devices(), ("ep",))
    config = smfree.EpConfig(
        num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, max_tokens=ROWS, dtype=jnp.float32
    )

    def exchange(x: jax.Array, topk_idx: jax.Array) -> tuple[jax.Array, ...]:
        d, token = smfree.dispatch(group.token(), x, topk_idx)
        out, _ = smfree.combine(token, d, d.x)
        return d.x, d.group_sizes, out

    with smfree.EpGroup.create(mesh, "ep", config=config) as group:
        sharded = jax.shard_map(exchange, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        d_x, group_sizes, out = map(np.asarray, jax.jit(sharded)(x, topk_idx))
        group.check()
    sizes = group_sizes.reshape(RANKS, LOCAL)
    blocks = d_x[:, 0].reshape(RANKS, -1).astype(int)
    grouped = [
        [divmod(int(name) - 1, ROWS) for name in block[: sizes[rank].sum()]]
        for rank, block in enumerate(blocks)
    ]
    routing = topk_idx.reshape(RANKS, ROWS, TOP_K)
    return Run(routing, grouped, sizes, (out[:, 0] / names).reshape(RANKS, ROWS))


def buffers(found: Run, rank: int) -> list[Slots]:
    """What stands in the buffers of a rank at each of `STEPS`."""
    others = range(RANKS)
    own: list[Row] = [(rank, position) for position in range(ROWS)]
    ends = np.cumsum(found.group_sizes[rank])
    experts: Slots = [
        (f"expert {rank * LOCAL + e}", found.grouped[rank][end - size : end])
        for e, (end, size) in enumerate(zip(ends, found.group_sizes[rank], strict=True))
    ]
    return [
        [("", own)],
        [(f"to {other}", found.sent(rank, other)) for other in others],
        [(f"from {other}", found.sent(other, rank)) for other in others],
        experts,
        [(f"to {other}", found.sent(other, rank)) for other in others],
        [(f"from {other}", found.sent(rank, other)) for other in others],
        [("", own)],
    ]


def check(found: Run) -> None:
    """Raises if the run and the drawing disagree."""
    for rank in range(RANKS):
        received = {row for source in range(RANKS) for row in found.sent(source, rank)}
        if set(found.grouped[rank]) != received:
            raise AssertionError(f"rank {rank} has rows that were not sent, or lost some")
    np.testing.assert_allclose(found.out, TOP_K)


def draw(axes: Axes, slots: Slots, longest: int) -> None:
    """One buffer: its parts below each other, the rows of a part side by side."""
    for line, (name, rows) in enumerate(slots):
        axes.text(-0.2, line + 0.5, name, ha="right", va="center", fontsize=8)
        for column, row in enumerate(rows):
            rank, position = row
            followed = row == FOLLOWED
            box = Rectangle(
                (column, line + 0.1),
                0.9,
                0.8,
                facecolor=COLOURS[rank],
                edgecolor="black" if followed else "none",
                linewidth=2,
            )
            axes.add_patch(box)
            axes.text(column + 0.45, line + 0.5, str(position), ha="center", va="center")
    axes.set(xlim=(-MARGIN, longest), ylim=(RANKS + 0.2, -0.2), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def save(found: Run, path: pathlib.Path) -> None:
    """A column per step, a row per rank."""
    figure = Figure(figsize=(10, 1.25 * RANKS), layout="constrained")
    lines = [buffers(found, rank) for rank in range(RANKS)]
    steps = zip(*lines, strict=True)
    longest = [max(len(rows) for slots in step for _, rows in slots) for step in steps]
    widths = [MARGIN + most for most in longest]
    grid: Sequence[Sequence[Axes]] = figure.subplots(RANKS, len(STEPS), width_ratios=widths)
    for rank, line in enumerate(grid):
        for axes, slots, most in zip(line, lines[rank], longest, strict=True):
            draw(axes, slots, most)
        line[0].set_ylabel(f"rank {rank}")
    titles = ("", "dispatch_send", "(mover)", "dispatch_recv", "combine_send", "(mover)")
    for axes, phase, step in zip(grid[0], (*titles, "combine_recv"), STEPS, strict=True):
        axes.set_title(f"{phase}\n{step}", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("life.png"))
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", RANKS)
    found = run()
    check(found)
    save(found, options.output)
    experts = found.experts_of(FOLLOWED)
    print(f"row {FOLLOWED[1]} of rank {FOLLOWED[0]} visits experts {experts}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
