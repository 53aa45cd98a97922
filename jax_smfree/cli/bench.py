# SPDX-License-Identifier: Apache-2.0
"""``jax-smfree bench``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click
import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import jax_smfree as smfree
from jax_smfree.bench import Shape, measure
from jax_smfree.bench.cases import AXIS, COMPUTE, LIBRARY, PEERS, PHASES, TOGETHER
from jax_smfree.cli import show
from jax_smfree.cli.options import (
    DTYPES,
    FILE,
    PICTURE,
    SIZES,
    Refused,
    Sizes,
    positive,
    refusing,
    sizes,
)


@click.command(short_help="Time dispatch and combine on this machine.")
@click.option("--shape", type=sizes, metavar=SIZES, default="1024x1024:2of8", show_default=True)
@click.option("--dtype", type=DTYPES, default="float32", show_default=True)
@click.option("--ranks", type=click.IntRange(1, 512), help="Default: all GPUs, or 4 CPU devices.")
@click.option(
    "--budget",
    type=positive,
    metavar="X",
    default=10.0,
    show_default=True,
    help="Seconds of samples.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--output", type=FILE, help="Write the JSON to a file as well.")
@click.option("--plot", type=PICTURE, help="Write a picture, e.g. bench.png.")
def bench(
    shape: Sizes,
    dtype: str,
    ranks: int | None,
    budget: float,
    as_json: bool,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Time dispatch and combine here, against other JAX ways, and under compute.

    A quick look at one shape. What is timed, and how, says docs/performance.md; the record is made
    with benchmarks/ in a clone.
    """
    mesh = _mesh(ranks)
    with refusing(ValueError):
        sized = Shape(mesh.size, shape.rows, shape.top_k, shape.experts, shape.hidden, dtype)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("compiling", total=None)

        def on_round(done: int, of: int) -> None:
            progress.update(task, description="rounds", completed=done, total=of)

        with refusing(ValueError, smfree.SmfreeError):
            result = measure(sized, mesh, budget, overlap=True, on_round=on_round)
    result["device"] = mesh.devices.flat[0].device_kind
    if as_json:
        show.as_json(result)
    else:
        _print(str(sized), result)
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")
        show.wrote(output)
    if plot:
        from jax_smfree.cli import bench_plot

        bench_plot.save(result, plot, f"{sized}, {result['device']}")
        show.wrote(plot)


def _mesh(ranks: int | None) -> Mesh:
    # Refused where JAX has started: then its devices are what there is.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", ranks or 4)
    with refusing(RuntimeError):
        devices = jax.devices()
    wanted = ranks or (4 if devices[0].platform == "cpu" else len(devices))
    if len(devices) < wanted:
        raise Refused(
            f"got --ranks {wanted}, expected at most {len(devices)}: JAX has no more devices "
            f"({devices[0].device_kind})."
        )
    return Mesh(devices[:wanted], (AXIS,))


def _print(title: str, result: dict[str, Any]) -> None:
    times = result["times_us"]
    mine = times[LIBRARY]["median"]

    def row(name: str, compared: str = "") -> tuple[str, ...]:
        spread = (f"{times[name][p] / 1e3:.3f}" for p in ("median", "p10", "p90"))
        return (name, *spread, compared)

    rows = [row(name) for name in ("launch", *PHASES)] + [row(LIBRARY)]
    rows += [row(peer, f"{times[peer]['median'] / mine:.2f} ×") for peer in PEERS]
    show.table(
        f"{title}; milliseconds, {result['rounds']} rounds",
        ("program", "median", "10 %", "90 %", f"of {LIBRARY}"),
        rows,
    )
    added = times[TOGETHER]["median"] - times[COMPUTE]["median"]
    show.table(
        "under compute",
        ("program", "median", "10 %", "90 %", "added to compute"),
        [row(COMPUTE), row(TOGETHER, f"{added / 1e3:.3f} ({added / mine:.0%} of {LIBRARY})")],
    )
