# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine on the CPU: the four phases and the round trip, against other JAX ways.

    python -m benchmarks.cpu                some minutes, if the machine is idle
    python -m benchmarks.cpu --smoke        that it works; the numbers mean little
    python -m benchmarks.cpu --load R.json  the table and the picture of an earlier run

Ranks are virtual devices of one process, and in one group of shapes 2 processes of 2 devices. What
is timed, and what is included, says ``jax_smfree/bench/programs.py``; the peers are in
``jax_ways.py`` beside it. Writes a JSON and a Markdown file, and a picture where matplotlib is.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path

from benchmarks import apart, machine, results
from benchmarks.cpu import report
from benchmarks.cpu.measure import measure
from benchmarks.report import show
from benchmarks.results import Json
from jax_smfree.bench import Shape

ROUTINGS = ((2, 8), (8, 64))
# What fits into minutes and a few GiB: copies of rows over all ranks, and the rows that all ranks
# together hold after an all_gather.
MAX_COPIES, MAX_GATHERED = 65536, 65536
SMOKE_SHAPES = [Shape(ranks, 64, 2, 8, 128, "float32", ranks // 2 or 1) for ranks in (1, 2, 4)]


def shapes(rows: list[int]) -> list[Shape]:
    ranks = (1, 2, 4, 8)
    grid = [
        Shape(r, t, k, e, 1024, dtype)
        for r, t, (k, e) in itertools.product(ranks, rows, ROUTINGS)
        for dtype in ("float32", "bfloat16")
        if r * t * k <= MAX_COPIES and r * r * t <= MAX_GATHERED
        if dtype == "float32" or t == 1024
    ]
    return grid + [Shape(4, 1024, k, e, 1024, "float32", processes=2) for k, e in ROUTINGS]


def run(wanted: Iterable[Shape], budget_s: float, commit: str | None) -> Json:
    """Shapes with as many devices, and processes, share a start of them."""
    result: Json = {"machine": machine.describe(commit), "cases": []}
    start_of = lambda shape: (shape.processes, shape.ranks)  # noqa: E731
    for (processes, ranks), group in itertools.groupby(sorted(wanted, key=start_of), start_of):
        print(f"{ranks} ranks, {processes} process(es)", flush=True)
        settings = {"shapes": [dataclasses.asdict(s) for s in group], "budget_s": budget_s}
        each = {"processes": processes, "devices_per_process": ranks // processes}
        variant = apart.Variant("", measure, settings, **each, platform="cpu", timeout_s=600)
        outcome, done = apart.run(variant)
        done.check()
        assert outcome is not None
        result["cases"] += outcome["cases"]
        result["ragged_all_to_all"] = outcome["ragged_all_to_all"]
    return result


def show_all(result: Json, path: Path) -> None:
    show(path, report.lines(result))
    try:
        from benchmarks.cpu import plot
    except ImportError as error:
        print(f"no picture: {error}")
    else:
        plot.save(result, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rows = [256, 1024, 4096]
    parser.add_argument("--rows", type=int, nargs="+", default=rows, help="rows per rank")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of samples per shape")
    results.add_options(parser)
    options = parser.parse_args()
    if options.load:
        show_all(results.load(options.load), options.load)
        return
    with results.folder(options) as folder:
        if options.smoke:
            result = run(SMOKE_SHAPES, 0.5, options.commit)
        else:
            result = run(shapes(options.rows), options.budget, options.commit)
        cpu, cores = (result["machine"][name] for name in ("cpu", "cores"))
        path = folder / f"cpu-{results.slug(cpu)}-{cores}.json"
        results.write(path, result)
        show_all(result, path)


if __name__ == "__main__":
    main()
