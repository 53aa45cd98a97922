# SPDX-License-Identifier: Apache-2.0
"""The first shape and 128 rows in a minute, in one table; two builds of the library side by side.

    python -m benchmarks.gpu quick                      of the installed jax_smfree
    python -m benchmarks.gpu quick --before PATH        and of another build, by turns
    python -m benchmarks.gpu quick --load R.json        the table of an earlier run
    python -m benchmarks.gpu quick --smoke              that it works, also without GPUs

PATH is the Python of an environment in which the other build is installed, or a folder with it
(``pip install --target``; an editable installation would come before that). The programs are those
of this clone, whatever they measure. Medians; with ``--before`` the better ones of the rounds.
Files are kept in ``--out`` only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks import ROOT, machine, results
from benchmarks.gpu import measures
from benchmarks.gpu.cases import SHAPES, SMOKE, SMOKE_SHAPES, Scale, make_case, make_mesh
from benchmarks.gpu.measures import DEFAULT
from benchmarks.gpu.report import Headline, headlines, targets_for
from benchmarks.gpu.timing import Gemms, copy_rate
from benchmarks.report import errors, machine_line, not_measured, number, show, table
from benchmarks.results import Json, Session

BEFORE, NOW = "before", "now"
ROUNDS = 2
BUDGET_S = 90


def measure(session: Session, smoke: bool) -> None:
    scale, mesh = (SMOKE if smoke else Scale()), make_mesh(jax.device_count())
    result, gemms = session.result, Gemms(mesh, scale)
    result |= {"library": str(machine.library()), "ranks": mesh.size, "link_ceilings": {}}
    session.part(result, "copy_rate", copy_rate, mesh, scale)
    for name in SMOKE_SHAPES if smoke else (SHAPES[0], SHAPES[-1]):
        print(name, flush=True)
        case = make_case(mesh, name)
        shape = result["shapes"][case.shape.name] = {**case.describe(), "movers": {}}
        overlap = len(result["shapes"]) == 1
        args = case, scale, session, gemms, overlap, DEFAULT
        session.part(shape["movers"], DEFAULT, measures.mover, *args)
    session.save()


def of_build(build: Path | None, smoke: bool) -> Json:
    """One run of the installed build, or the one at ``build``, in a new process."""
    python, env = sys.executable, dict(os.environ)
    if build and build.is_dir():
        env["PYTHONPATH"] = str(build.resolve())
    elif build:
        python = str(build.absolute())  # not resolved: an environment's Python is a link
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, "-m", "benchmarks.gpu", "quick", "--out", scratch]
        subprocess.run(command + ["--smoke"] * smoke, check=True, cwd=ROOT, env=env)
        (written,) = Path(scratch).glob("*.json")
        return results.load(written)


def compare(options: argparse.Namespace, folder: Path) -> tuple[Json, Path]:
    """Both builds by turns: what disturbs the machine for a while disturbs them both."""
    result: Json = {BEFORE: [], NOW: []}
    for turn in range(ROUNDS):
        for name, build in ((BEFORE, options.before), (NOW, None)):
            print(f"== {name}, {turn + 1} of {ROUNDS}", flush=True)
            result[name].append(of_build(build, options.smoke))
        if result[BEFORE][0]["library"] == result[NOW][0]["library"]:
            raise SystemExit(
                f"--before: got {options.before}, which leads to the jax_smfree that is installed "
                f"here, {result[NOW][0]['library']}, expected another build. If that is an "
                "editable installation, give the Python of another environment."
            )
    device = results.slug(result[NOW][0]["machine"]["device"])
    path = folder / f"gpu-quick-builds-{device}-x{result[NOW][0]['ranks']}.json"
    results.write(path, result)
    return result, path


def lines(result: Json) -> Iterator[str]:
    builds = {name: result[name] for name in (BEFORE, NOW) if name in result} or {NOW: [result]}
    last = builds[NOW][-1]
    ranks, device = last["ranks"], last["machine"]["device"]
    yield from (f"# {', '.join(last['shapes'])} on {ranks} × {device}", "")
    for name, runs in builds.items():
        yield f"- {name}: {machine_line(runs[-1]['machine'], ranks)}, {runs[-1]['library']}"
    yield ""
    ratio = [f"{NOW} / {BEFORE}"] if len(builds) > 1 else []
    yield from table(["", *builds, *ratio, "target", ""], _rows(builds, targets_for(last)))
    runs_by_name = {f"{n} {at}": run for n, runs in builds.items() for at, run in enumerate(runs)}
    yield from not_measured(errors(runs_by_name))


def _rows(builds: dict[str, list[Json]], targets: int) -> Iterator[list[str]]:
    """What any build has a number for; of several runs of a build the best one."""
    found = [[list(headlines(run)) for run in runs] for runs in builds.values()]
    for at, headline in enumerate(found[-1][-1]):
        values = [_best([run[at] for run in runs]) for runs in found]
        if any(value is not None for value in values):
            texts = [number(value, headline.digits) for value in values]
            if len(values) > 1:
                texts.append(f"{values[1] / values[0]:.3f}" if all(values) else "–")
            last = headline._replace(value=values[-1])
            yield [headline.what, *texts, last.target(targets), last.verdict(targets)]


def _best(of_runs: list[Headline]) -> float | None:
    values = [headline.value for headline in of_runs if headline.value is not None]
    return (max if of_runs[0].at_least else min)(values, default=None)


def show_all(result: Json, path: Path) -> None:
    show(path, lines(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, metavar="PATH", help="another build, see above")
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    with results.folder(options, default=None) as folder:
        if options.before:
            result, path = compare(options, folder)
        else:
            described = machine.describe_gpus(options.commit)
            path = folder / results.file_of_gpus("quick", described)
            session = Session(path, described, BUDGET_S)
            measure(session, options.smoke)
            result = session.result
        show_all(result, path)
