# SPDX-License-Identifier: Apache-2.0
"""``jax-smfree plan``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

import jax_smfree as smfree
from jax_smfree.cli import show
from jax_smfree.cli.options import (
    DTYPES,
    EXISTING_FILE,
    MAX_LANES,
    MAX_RANKS,
    PICTURE,
    SIZES,
    Sizes,
    numbers,
    positive,
    refusing,
    sizes,
)
from jax_smfree.plan import Machine, Prediction, Routing, sweep


class Line(NamedTuple):
    """What is shown of a prediction, in the table and in the picture; numbers by column."""

    ranks: int
    mode: str
    numbers: dict[str, float]


@click.command()
@click.option("--shape", type=sizes, metavar=SIZES, default="8192x7168:8of256", show_default=True)
@click.option("--dtype", type=DTYPES, default="bfloat16", show_default=True)
@click.option(
    "--ranks", type=numbers, metavar="N,N,…", help="Default: powers of two that divide the experts."
)
@click.option("--ranks-per-node", type=click.IntRange(1, MAX_RANKS), default=8, show_default=True)
@click.option("--lanes", type=click.IntRange(1, MAX_LANES), default=1, show_default=True)
@click.option(
    "--recv-capacity", type=click.IntRange(1, 2**31 - 1), metavar="N", help="Default: no bound."
)
@click.option("--fp8", is_flag=True, help="Rows of a dispatch travel as EpConfig(wire=Fp8()).")
@click.option("--inference", is_flag=True, help="A group with differentiable=False.")
@click.option("--machine", type=EXISTING_FILE, help="Rates that benchmarks.gpu measured (JSON).")
@click.option("--nvlink-gb-s", type=positive, metavar="X", help="Per GPU and direction.")
@click.option("--network-gb-s", type=positive, metavar="X", help="Per GPU and direction.")
@click.option("--hbm-gb-s", type=positive, metavar="X", help="Read plus written.")
@click.option("--matmul-tflop-s", type=positive, metavar="X", help="Of large matrix products.")
@click.option("--routing", type=EXISTING_FILE, help="Expert ids [rows, K] of a router (.npy).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--plot", type=PICTURE, help="Write a picture, e.g. plan.png.")
def plan(
    shape: Sizes,
    dtype: str,
    ranks: tuple[int, ...] | None,
    ranks_per_node: int,
    lanes: int,
    recv_capacity: int | None,
    fp8: bool,
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
    with refusing(ValueError, TypeError):
        config = smfree.EpConfig(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            max_tokens=shape.rows,
            dtype=dtype,
            num_lanes=lanes,
            recv_capacity=recv_capacity,
            wire=smfree.Fp8() if fp8 else None,
            ranks_per_node=ranks_per_node,
            differentiable=not inference,
        )
        rated = _machine(machine, {name: rate for name, rate in rates.items() if rate is not None})
        sample = Routing(shape.experts, shape.top_k, _sample(routing))
        found = sweep(config, ranks or list(_powers_of_two(shape.experts)), rated, routing=sample)
    lines = [_line(prediction) for prediction in found]
    if as_json:
        show.as_json(
            {
                "shape": str(shape),
                "machine": dataclasses.asdict(rated),
                "predictions": [prediction.to_json() for prediction in found],
            }
        )
    else:
        _print(f"{shape} {dtype}, {ranks_per_node} ranks per node", lines)
    if plot:
        from jax_smfree.cli import plan_plot

        plan_plot.save(lines, plot, f"{shape} {dtype}")
        show.wrote(plot)


def _powers_of_two(experts: int) -> Iterator[int]:
    ranks = 2
    while ranks <= MAX_RANKS and experts % ranks == 0:
        yield ranks
        ranks *= 2


def _machine(path: Path | None, rates: dict[str, float]) -> Machine:
    if path:
        return Machine.from_results(show.read_json(path), **rates)
    return dataclasses.replace(Machine(), **rates)  # type: ignore[arg-type]


def _sample(path: Path | None) -> Any:
    if path is None:
        return None
    with refusing(Exception, what=f"got {path}, expected an array of np.save"):
        sample = np.load(path, allow_pickle=False)
        if not isinstance(sample, np.ndarray):
            raise ValueError(f"it holds a {type(sample).__name__}")
        return sample


def _line(p: Prediction) -> Line:
    return Line(
        p.ranks,
        p.mode,
        {
            "memory GiB": p.buffer_bytes / 2**30,
            "NVLink MB": p.nvlink_bytes / 1e6,
            "network MB": p.network_bytes / 1e6,
            "SM ms": p.sm_us / 1e3,
            "wire ms": p.wire_us / 1e3,
            "relay ms": p.forward_us / 1e3,
            "GFLOP": p.hiding_gflop,
            "MLP width": p.hiding_width,
        },
    )


def _print(title: str, lines: Sequence[Line]) -> None:
    names = [name.replace(" ", "\n") for name in lines[0].numbers]
    rows = (
        [str(line.ranks), line.mode, *(_text(*number) for number in line.numbers.items())]
        for line in lines
    )
    show.table(title, ["ranks", "mode", *names], rows, text=2)


def _text(column: str, number: float) -> str:
    digits = {"GiB": 1, "ms": 2}.get(column.split()[-1], 0)
    return "" if column == "relay ms" and not number else f"{number:.{digits}f}"
