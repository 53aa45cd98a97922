# SPDX-License-Identifier: Apache-2.0
"""Operations of few rows, as a decode has them: each phase and whole operations, in device time.

    python -m benchmarks.gpu decode                 a minute
    python -m benchmarks.gpu decode --load R.json   the table of an earlier run
    python -m benchmarks.gpu decode --smoke         that it works, also without GPUs

By number of rows per rank, with the mover that the library chooses and with rows stored by the
kernels. Phases are those of rows that have long arrived; an operation is from the first block of
its send to the last one of its recv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import jax

from benchmarks import machine, results
from benchmarks.gpu import measures
from benchmarks.gpu.cases import SMOKE, SMOKE_SHAPES, Scale, make_case, make_mesh
from benchmarks.gpu.measures import DEFAULT, SM_PUSH
from benchmarks.gpu.timing import Gemms, copy_rate
from benchmarks.gpu.trace import KERNELS
from benchmarks.report import errors, find, machine_line, not_measured, number, show, table
from benchmarks.results import Json, Session

ROWS = (1, 8, 32, 128, 512)
SHAPE = "7168:8of256"
BUDGET_S = 300
# The columns: a name, and where its numbers stand under a mover.
COLUMNS = {
    **{name.replace("_", " "): ("phases", name) for name in KERNELS},
    "four phases": ("phases", "total"),
    "dispatch": ("native", "dispatch", "on_device"),
    "combine": ("native", "combine", "on_device"),
    "round trip": ("native", "round_trip", "on_device"),
    "dispatch, fp8": ("fp8", "rows", "on_device"),
    "kept": ("fp8", "kept", "on_device"),
}


def measure(session: Session, smoke: bool) -> None:
    scale, mesh = (SMOKE if smoke else Scale()), make_mesh(jax.device_count())
    result, gemms = session.result, Gemms(mesh, scale)
    result |= {"ranks": mesh.size, "link_ceilings": {}}
    session.part(result, "copy_rate", copy_rate, mesh, scale)
    for name in SMOKE_SHAPES if smoke else [f"{rows}x{SHAPE}" for rows in ROWS]:
        print(name, flush=True)
        case = make_case(mesh, name)
        shape = result["shapes"][case.shape.name] = {**case.describe(), "movers": {}}
        for mover in (DEFAULT, SM_PUSH):
            args = case, scale, session, gemms, False, mover
            session.part(shape["movers"], mover, measures.mover, *args)
    session.save()


def lines(result: Json) -> Iterator[str]:
    yield from (f"# Few rows on {result['ranks']} × {result['machine']['device']}", "")
    yield from (machine_line(result["machine"], result["ranks"]), "")
    yield from ("Microseconds of device time, medians:", "")
    yield from table(["shape", "mover", *COLUMNS], _rows(result["shapes"]))
    yield from not_measured(errors(result))


def _rows(shapes: Json) -> Iterator[list[str]]:
    for name, shape in shapes.items():
        for mover, found in shape["movers"].items():
            medians = (find(found, *path, "p50") for path in COLUMNS.values())
            yield [name, mover, *(number(median, 1) for median in medians)]


def add_options(parser: argparse.ArgumentParser) -> None:
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    if options.load:
        show(options.load, lines(results.load(options.load)))
        return
    with results.folder(options) as folder:
        described = machine.describe_gpus(options.commit)
        device, count = results.slug(described["device"]), described["devices"]
        path = folder / f"gpu-decode-{device}-x{count}.json"
        session = Session(path, described, BUDGET_S)
        measure(session, options.smoke)
        show(path, lines(session.result))
