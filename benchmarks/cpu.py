# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine on the CPU: the four phases and the round trip, against other JAX ways.

    python benchmarks/cpu.py                      some minutes, if the machine is idle
    python benchmarks/cpu.py --quick              that it works; the numbers mean little
    python benchmarks/cpu.py --plot cpu.png       with a picture
    python benchmarks/cpu.py --load R.json --plot cpu.png

Ranks are virtual devices of one process, and in one group of rows 2 processes of 2 devices. What is
timed, and what is included, says ``jax_smfree/bench/programs.py``; the peers are in ``jax_ways.py``
beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _machine
import _table

from jax_smfree.bench.cases import Shape

HERE = Path(__file__).parent
ROUTINGS = ((2, 8), (8, 64))
# What fits into minutes and a few GiB: copies of rows over all ranks, and the rows that all ranks
# together hold after an all_gather.
MAX_COPIES, MAX_GATHERED = 65536, 65536


def shapes(quick: bool, rows: list[int]) -> list[Shape]:
    if quick:
        return [Shape(ranks, 64, 2, 8, 128, "float32") for ranks in (1, 4)]
    ranks = (1, 2, 4, 8)
    grid = [
        Shape(r, t, k, e, 1024, dtype)
        for r, t, (k, e) in itertools.product(ranks, rows, ROUTINGS)
        for dtype in ("float32", "bfloat16")
        if r * t * k <= MAX_COPIES and r * r * t <= MAX_GATHERED
        if dtype == "float32" or t == 1024
    ]
    return grid + [Shape(4, 1024, k, e, 1024, "float32", processes=2) for k, e in ROUTINGS]


def run(shapes_of_one_start: list[Shape], budget_s: float) -> dict[str, Any]:
    """Runs the worker with the devices, and processes, that the shapes have in common."""
    first = shapes_of_one_start[0]
    print(f"{first.ranks} ranks, {first.processes} process(es)", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        request, result = Path(directory, "request.json"), Path(directory, "result.json")
        task = {"shapes": [dataclasses.asdict(s) for s in shapes_of_one_start]}
        request.write_text(json.dumps({**task, "budget_s": budget_s}))
        worker = [str(HERE / "_worker.py"), str(request), str(result)]
        if first.processes == 1:
            flags = os.environ.get("XLA_FLAGS", "")
            flags += f" --xla_force_host_platform_device_count={first.ranks}"
            environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            subprocess.run([sys.executable, *worker], env=environment, check=True)
        else:
            from jax_smfree.testing import launch

            launch(
                worker,
                processes=first.processes,
                devices_per_process=first.ranks // first.processes,
                timeout_s=600,
                follow=sys.stdout,
            ).check()
        outcome: dict[str, Any] = json.loads(result.read_text())
        return outcome


def measure(wanted: list[Shape], budget_s: float) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": _machine.describe(), "cases": []}
    start_of = lambda s: (s.processes, s.ranks)  # noqa: E731
    for _, group in itertools.groupby(sorted(wanted, key=start_of), start_of):
        outcome = run(list(group), budget_s)
        result["cases"] += outcome["cases"]
        result["ragged_all_to_all"] = outcome["ragged_all_to_all"]
    return result


def default_output(machine: dict[str, Any]) -> Path:
    cpu = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    return HERE / "results" / f"cpu-{cpu}-{machine['cores']}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tiny shapes, nothing is saved")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[256, 1024, 4096], help="rows per rank"
    )
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of samples per shape")
    parser.add_argument("--output", type=Path, help="JSON; default results/cpu-<processor>.json")
    parser.add_argument("--plot", type=Path, help="PNG (needs matplotlib)")
    parser.add_argument("--load", type=Path, help="shows an earlier JSON instead of measuring")
    options = parser.parse_args()
    if options.load:
        result = json.loads(options.load.read_text())
    else:
        result = measure(
            shapes(options.quick, options.rows), 0.5 if options.quick else options.budget
        )
        output = options.output or (None if options.quick else default_output(result["machine"]))
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
            print(f"wrote {output}")
    print("\n".join(_table.lines(result)))
    if options.plot:
        import _plot

        _plot.save(result, options.plot)
        print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
