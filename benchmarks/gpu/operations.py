# SPDX-License-Identifier: Apache-2.0
"""Whole calls, phases, overlap, an MoE layer and JAX's own ways, on the GPUs of one process.

    python -m benchmarks.gpu operations                 all shapes, all GPUs, some minutes
    python -m benchmarks.gpu operations --shapes first  the first shape only
    python -m benchmarks.gpu operations --load R.json   tables and pictures of an earlier run
    python -m benchmarks.gpu operations --smoke         that it works, also without GPUs

Writes a JSON, which is complete up to wherever a run ends, a Markdown file and two pictures (where
matplotlib is installed). A part that fails leaves its error there, and the others go on. What every
number means is said above its table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import machine, results
from benchmarks.gpu import crossover, links, measures, moe, peers, report, training
from benchmarks.gpu.cases import SHAPES, SMOKE, SMOKE_SHAPES, Scale, make_case, make_mesh
from benchmarks.gpu.measures import COPY_ENGINE, DEFAULT, MOVERS, SM_PUSH
from benchmarks.gpu.timing import Gemms, copy_rate, launch
from benchmarks.report import show
from benchmarks.results import Json, Session


def measure(session: Session, ranks: int, names: list[str], scale: Scale) -> None:
    """What matters most comes first, for all shapes: the budget may end before all is done."""
    mesh = make_mesh(ranks)
    result, part = session.result, session.part
    gemms, cases = Gemms(mesh, scale), [make_case(mesh, name) for name in names]
    result["ranks"] = ranks
    result["shapes"] = {c.shape.name: {**c.describe(), "movers": {}, "peers": {}} for c in cases}
    part(result, "copy_rate", copy_rate, mesh, scale)
    part(result, "launch", launch, mesh, scale)
    part(result, "gemms", gemms.measure)
    part(result, "link_ceilings", links.measure, cases)

    def each(title: str, kind: str | None, measure_one: Callable[..., None], *args: Any) -> None:
        for case in cases:
            shape = case.shape.name
            print(shape, flush=True)
            place = result["shapes"][shape]
            part(place[kind] if kind else place, title, measure_one, case, scale, *args)

    def each_mover(name: str) -> None:
        # The default is one of the others: the overlap is theirs.
        each(name, "movers", measures.mover, session, gemms, name != DEFAULT, name)

    each_mover(DEFAULT)
    each_mover(COPY_ENGINE)
    each("all_gather", "peers", peers.measure, "all_gather")
    each("moe", None, moe.measure)
    each("training", None, training.measure, gemms)
    ways = {name: MOVERS[name] for name in (COPY_ENGINE, SM_PUSH)}
    part(result, "crossover", crossover.measure, mesh, scale, ways)
    each_mover(SM_PUSH)
    for name in list(peers.PEERS)[1:]:
        each(name, "peers", peers.measure, name)


def show_all(result: Json, path: Path) -> None:
    show(path, report.lines(result))
    try:
        from benchmarks.gpu import plot
    except ImportError as error:
        print(f"no pictures: {error}")
    else:
        plot.save(result, path)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, help="the first GPUs; default all")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["all"],
        help=f"all, first, or ROWSxHIDDEN:KofEXPERTS; default {' '.join(SHAPES)}",
    )
    parser.add_argument("--budget", type=float, default=330, help="seconds; then no part starts")
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    known = SMOKE_SHAPES if options.smoke else SHAPES
    names = {"all": list(known), "first": [known[0]]}.get(options.shapes[0], options.shapes)
    ranks = options.ranks or jax.device_count()
    described = machine.describe_gpus(options.commit)
    with results.folder(options) as folder:
        path = folder / f"gpu-{results.slug(described['device'])}-x{ranks}.json"
        session = Session(path, described, options.budget)
        measure(session, ranks, names, SMOKE if options.smoke else Scale())
        session.save()
        show_all(session.result, path)
