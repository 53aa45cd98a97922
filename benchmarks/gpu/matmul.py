# SPDX-License-Identifier: Apache-2.0
"""Grouped matmuls on one GPU: which one should the MoE layers take?

    python -m benchmarks.gpu matmul           some minutes
    python -m benchmarks.gpu matmul --smoke   that it works; kernels for GPUs fail without one

Times what multiplies groups of rows with matrices of their own, in bfloat16: forward, dx and dw,
each alone, and the three one after the other. ``dense`` is one matmul of as many operations. All
are timed by turns, because the clock of a busy GPU falls, and the medians are compared.

Each candidate is checked at a small shape with empty groups and with groups that end at any row,
against float32 matmuls, and again with NaN in the rows of no group, which must reach nothing else;
then against float32 at the shape itself. Writes a JSON and a Markdown file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import machine, results
from benchmarks.gpu.matmul_candidates import CANDIDATES, DENSE, Candidate, Kernels
from benchmarks.gpu.matmul_cases import (
    CHECK_WIDTHS,
    SHAPES,
    SMOKE_CHECK_WIDTHS,
    SMOKE_SHAPES,
    TOLERANCE,
    Operands,
    Run,
    Shape,
    bind,
    check,
    make_operands,
    relative_errors,
    start,
    wait,
)
from benchmarks.gpu.timing import turn_us
from benchmarks.report import errors, machine_line, not_measured, number, show, table
from benchmarks.results import Json, Session

BUDGET_S = 200
CHECK_S = 100  # of one candidate, beside the others
ROUNDS = 7
TURN_S = 0.02  # of one candidate, in calls back to back
WHAT = ("forward", "dx", "dw", "all")


def check_apart(name: str, options: argparse.Namespace) -> Json:
    """In a process of its own: a kernel that hangs or breaks the device ends nothing else."""
    command = [sys.executable, "-m", "benchmarks.gpu", "matmul", "--check", name]
    command += ["--smoke"] if options.smoke else []
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    environment |= {"JAX_TRACEBACK_FILTERING": "off"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHECK_S)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare(
    into: Json,
    runs: dict[str, dict[str, Run]],
    candidate: Candidate,
    compiled: Callable[[], dict[str, Run]],
    operands: Operands,
) -> None:
    mine = bind(candidate, compiled(), operands)
    if candidate.name != DENSE:
        groups = (0, operands.w.shape[0] // 2, operands.w.shape[0] - 1)
        into["errors"] = relative_errors(mine, operands, groups)
    for run in mine.values():
        wait(run())
    if len(mine) == len(Kernels._fields):
        parts = tuple(mine.values())
        mine["all"] = lambda: [run() for run in parts][-1]
    runs[candidate.name] = mine


def by_turns(place: Json, runs: dict[str, dict[str, Run]], operations: int, rounds: int) -> None:
    samples: dict[tuple[str, str], list[float]] = {}
    for _, what, (name, mine) in itertools.product(range(rounds), WHAT, runs.items()):
        if what in mine:
            us = turn_us(mine[what], TURN_S, wait)
            samples.setdefault((name, what), []).append(us / 1e3)
    for (name, what), times in samples.items():
        time_ms = statistics.median(times)
        count = 3 if what == "all" else 1
        place[name][what] = {
            "ms": round(time_ms, 4),
            "least_ms": round(min(times), 4),
            "tflops": round(count * operations / time_ms / 1e9, 1),
        }


def measure(session: Session, options: argparse.Namespace) -> None:
    shapes = SMOKE_SHAPES if options.smoke else SHAPES
    checks = session.result.setdefault("checks", {})
    names = [c.name for c in CANDIDATES if c.name != DENSE and not c.slow]
    with ThreadPoolExecutor() as pool:
        found = {name: pool.submit(check_apart, name, options) for name in names}
        for name, future in found.items():
            session.part(checks, name, lambda into, future=future: into.update(future.result()))
    candidates = [c for c in CANDIDATES if "error" not in checks.get(c.name, {})]
    for slow, some in ((False, shapes), (True, shapes[:1])):
        for shape in some:
            measure_shape(session, shape, [c for c in candidates if c.slow is slow])


def measure_shape(session: Session, shape: Shape, candidates: list[Candidate]) -> None:
    print(shape, flush=True)
    place = session.result["shapes"].setdefault(str(shape), {})
    operands = make_operands(shape.hidden, shape.width, shape.group_sizes())
    runs: dict[str, dict[str, Run]] = {}
    # Alone first, as XLA chooses a kernel for the dense one by timing some.
    alone = [c for c in candidates if c.name == DENSE]
    for together in (alone, [c for c in candidates if c.name != DENSE]):
        with ThreadPoolExecutor() as pool:
            compiled = [None if session.spent else start(pool, c, operands) for c in together]
            for candidate, ready in zip(together, compiled, strict=True):
                session.part(place, candidate.name, prepare, runs, candidate, ready, operands)
    by_turns(place, runs, shape.operations, ROUNDS if alone else 1)
    session.save()


def _row(name: str, found: Json, dense: Json) -> list[str]:
    cells = []
    for what in WHAT:
        rate, best = (each.get(what, {}).get("tflops") for each in (found, dense))
        share = f" ({rate / best:.0%})" if rate and best and name != DENSE else ""
        cells.append(number(rate, 0) + share)
    worst = max(found.get("errors", {"": 0.0}).values())
    return [name, *cells, "" if worst < TOLERANCE else f"**wrong**: error {worst:.1e}"]


def _check_row(name: str, found: Json) -> list[str]:
    small = found.get("small", {})
    wrong = [what for what, error in small.items() if not error < TOLERANCE]
    worst = f"{max(small.values()):.1e}" if small else "–"
    return [name, worst, ", ".join(wrong), ", ".join(found.get("leaks", []))]


def lines(result: Json) -> Iterator[str]:
    described = result["machine"]
    yield from (f"# Grouped matmuls on {described['device']}", "", machine_line(described), "")
    yield from ("TFLOP/s, and the share of one dense matmul.", "")
    for shape, found in result["shapes"].items():
        yield from (f"## {shape}", "")
        rows = (_row(name, each, found.get(DENSE, {})) for name, each in found.items())
        yield from table(["", "forward", "dx", "dw", "all three", "check"], rows)
    yield from ("## Empty groups, groups that end at any row, NaN after them", "")
    rows = (_check_row(name, each) for name, each in result["checks"].items())
    yield from table(["", "largest error", "wrong", "NaN reaches"], rows)
    places = {"shapes": result["shapes"], "checks": result["checks"]}
    yield from not_measured(errors(places))


def show_all(result: Json, path: Path) -> None:
    show(path, lines(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", metavar="NAME", help="checks one candidate and measures nothing")
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    if options.check:
        widths = SMOKE_CHECK_WIDTHS if options.smoke else CHECK_WIDTHS
        named = {candidate.name: candidate for candidate in CANDIDATES}
        print(json.dumps(check(named[options.check], widths)))
        return
    described = machine.describe_gpus(options.commit)
    with results.folder(options) as folder:
        path = folder / f"gpu-matmul-{results.slug(described['device'])}.json"
        session = Session(path, described, BUDGET_S)
        measure(session, options)
        show_all(session.result, path)
