# SPDX-License-Identifier: Apache-2.0
"""``jax-smfree plan``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

import jax_smfree as smfree
from jax_smfree.cli import show
from jax_smfree.cli.options import DTYPES, EXISTING_FILE, FILE, SIZES, Sizes, numbers, sizes
from jax_smfree.plan import Machine, Prediction, Routing, sweep

_MAX_RANKS = 2048


@click.command()
@click.option("--shape", type=sizes, metavar=SIZES, default="8192x7168:8of256", show_default=True)
@click.option("--dtype", type=DTYPES, default="bfloat16", show_default=True)
@click.option(
    "--ranks", type=numbers, metavar="N,N,…", help="Default: powers of two that divide the experts."
)
@click.option("--ranks-per-node", type=click.IntRange(1), default=8, show_default=True)
@click.option("--lanes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--inference", is_flag=True, help="A group with differentiable=False.")
@click.option("--machine", type=EXISTING_FILE, help="Rates that benchmarks.gpu measured (JSON).")
@click.option("--nvlink-gb-s", type=float, help="Per GPU and direction.")
@click.option("--network-gb-s", type=float, help="Per GPU and direction.")
@click.option("--hbm-gb-s", type=float, help="Read plus written.")
@click.option("--matmul-tflop-s", type=float, help="Of large matrix products.")
@click.option("--routing", type=EXISTING_FILE, help="Expert ids [rows, K] of a router (.npy).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--plot", type=FILE, help="Write a picture, e.g. plan.png.")
def plan(
    shape: Sizes,
    dtype: str,
    ranks: tuple[int, ...] | None,
    ranks_per_node: int,
    lanes: int,
    inference: bool,
    machine: Path | None,
    routing: Path | None,
    as_json: bool,
    plot: Path | None,
    **rates: float | None,
) -> None:
    """Predict memory, bytes per link, and times for 2 to 2,048 ranks.

    Rates that are not given are those of an H200, with 400 Gb/s of network. Each line is the
    busiest rank. Phases keep the SMs busy; rows on the wire leave them to compute, and the last
    columns say how much compute lasts as long: matrix products, and the width of a shared expert
    (MLP). docs/command_line.md says how far off the model was where it could be measured.
    """
    try:
        config = smfree.EpConfig(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            max_tokens=shape.rows,
            dtype=dtype,
            num_lanes=lanes,
            ranks_per_node=ranks_per_node,
            differentiable=not inference,
        )
        rated = _machine(machine, {name: rate for name, rate in rates.items() if rate is not None})
        sample = Routing(shape.experts, shape.top_k, _sample(routing))
        found = sweep(config, ranks or list(_powers_of_two(shape.experts)), rated, routing=sample)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        show.as_json(
            {
                "shape": str(shape),
                "machine": dataclasses.asdict(rated),
                "predictions": [prediction.to_json() for prediction in found],
            }
        )
    else:
        _print(f"{shape} {dtype}, {ranks_per_node} ranks per node", found)
    if plot:
        from jax_smfree.cli import plan_plot

        plan_plot.save(found, plot, f"{shape} {dtype}")
        show.wrote(plot)


def _powers_of_two(experts: int) -> Iterator[int]:
    ranks = 2
    while ranks <= _MAX_RANKS and experts % ranks == 0:
        yield ranks
        ranks *= 2


def _machine(path: Path | None, rates: dict[str, float]) -> Machine:
    if path:
        return Machine.from_results(show.read_json(path), **rates)
    return dataclasses.replace(Machine(), **rates)  # type: ignore[arg-type]


def _sample(path: Path | None) -> Any:
    return None if path is None else np.load(path, allow_pickle=False)


def _print(title: str, found: Sequence[Prediction]) -> None:
    head = ["ranks", "mode", "buffers GiB", "NVLink MB", "network MB", "phases ms", "wire ms"]
    head += ["forward ms", "GFLOP", "MLP width"]
    show.table(
        title,
        head,
        (
            (
                str(p.ranks),
                p.mode,
                f"{p.buffer_bytes / 2**30:.1f}",
                f"{p.nvlink_bytes / 1e6:.0f}",
                f"{p.network_bytes / 1e6:.0f}",
                f"{p.sm_us / 1e3:.2f}",
                f"{p.wire_us / 1e3:.2f}",
                f"{p.forward_us / 1e3:.2f}" if p.forward_us else "",
                f"{p.hiding_gflop:.0f}",
                f"{p.hiding_width:.0f}",
            )
            for p in found
        ),
        text=2,
    )
