# SPDX-License-Identifier: Apache-2.0
"""A process per GPU (NVSHMEM) beside one process with all GPUs: calls, phases, overlap.

    python -m benchmarks.gpu processes                 some minutes
    python -m benchmarks.gpu processes --load R.json   the table of an earlier run
    python -m benchmarks.gpu processes --smoke         on CPUs: that it works

The same measurements as in ``operations``, by turns in new processes. Of traces a process has its
own ranks only, so the phases of the second form are those of rank 0. Writes a JSON and a Markdown
file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks import apart, machine, results
from benchmarks.gpu import measures
from benchmarks.gpu.cases import SHAPES, SMOKE, SMOKE_SHAPES, Scale, make_case, make_mesh
from benchmarks.gpu.measures import DEFAULT
from benchmarks.gpu.report import CALLS
from benchmarks.gpu.timing import Gemms, copy_rate
from benchmarks.report import Row, comparison, machine_line, show
from benchmarks.results import Json, Session
from jax_smfree.testing.environment import visible_gpus

ONE, MANY = "one process", "a process per GPU"
ROUNDS = 2
SMOKE_RANKS = 2
LEGEND = """\
Medians in microseconds; the ratio is that of the second form to the first. All numbers of a form
are the better ones of its rounds, which alternate with those of the other form. *call*: host time
of a call, back to back. *phase*: device time, where the rows have long arrived; of all ranks in
the first form, of rank 0 in the second. *hidden*: share of the transfer that a chain of products
hides."""


def measure(path: str, settings: Json) -> None:
    """In each process of one form: everything that is compared."""
    apart.join()
    scale = SMOKE if settings["smoke"] else Scale()
    mesh = make_mesh(jax.device_count())
    session = Session(
        Path(path if jax.process_index() == 0 else os.devnull),
        machine.describe_gpus(settings["commit"]),
        budget_s=300,
    )
    result, gemms = session.result, Gemms(mesh, scale)
    session.part(result, "copy_rate", copy_rate, mesh, scale)
    session.part(result, "gemms", gemms.measure)
    result["link_ceilings"] = {}
    for name in settings["shapes"]:
        case = make_case(mesh, name)
        shape = result["shapes"][case.shape.name] = {**case.describe(), "movers": {}}
        overlap = name == settings["shapes"][0]
        args = case, scale, session, gemms, overlap, DEFAULT
        session.part(shape["movers"], DEFAULT, measures.mover, *args)
    session.save()


def rows(form: Json) -> Iterator[Row]:
    """µs, or shares, of one run of one form."""
    for shape, found in form["shapes"].items():
        mover = found["movers"][DEFAULT]
        native = mover.get("native", {})
        yield from ((shape, f"call: {c}", native[c]["p50"]) for c in CALLS if c in native)
        for name, phase in mover.get("phases", {}).items():
            if isinstance(phase, dict):
                yield shape, f"phase: {name}", phase["p50"]
        for entry in mover.get("overlap", {}).get("dispatch", []):
            if "hidden" in entry:
                yield shape, f"hidden: dispatch, {entry['gemms']} products", entry["hidden"]


def lines(result: Json) -> Iterator[str]:
    described = next(run for name in (ONE, MANY) for run in result[name])["machine"]
    yield from ("# A process per GPU beside one process", "")
    yield from (machine_line(described, described["devices"]), "", LEGEND, "")
    yield from comparison(result, (ONE, MANY), rows)


def show_all(result: Json, path: Path) -> None:
    show(path, lines(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    default = (SHAPES[0], SHAPES[1], SHAPES[4])
    parser.add_argument("--shapes", nargs="+", help=f"default {' '.join(default)}")
    parser.set_defaults(default_shapes=default)
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    gpus = SMOKE_RANKS if options.smoke else len(visible_gpus())
    settings = {
        "shapes": options.shapes or [*(SMOKE_SHAPES if options.smoke else options.default_shapes)],
        "commit": options.commit,
        "smoke": options.smoke,
    }
    platform = "cpu" if options.smoke else "cuda"
    variants = [
        apart.Variant(name, measure, settings, processes, gpus // processes, platform)
        for name, processes in ((ONE, 1), (MANY, gpus))
    ]
    result: Json = {}
    with results.folder(options) as folder:
        path = apart.by_turns(
            variants,
            ROUNDS,
            result,
            lambda m: folder / f"gpu-processes-{results.slug(m['device'])}-x{gpus}.json",
        )
        show_all(result, path)
    if result["failed"]:
        raise SystemExit(1)
