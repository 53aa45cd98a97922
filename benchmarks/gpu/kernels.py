# SPDX-License-Identifier: Apache-2.0
"""Every kernel of the four phases under NVIDIA's profiler: its time, and the memory it moves.

    python -m benchmarks.gpu kernels                 a minute; needs nvcc and Nsight Compute (ncu)
    python -m benchmarks.gpu kernels --load R.json   the table of an earlier run
    python -m benchmarks.gpu kernels --smoke         only that the programs run

One rank, so that nothing moves beside the kernels and the profiler may run them one by one. Writes
a JSON and a Markdown file. The times have the launch of a kernel in them, which XLA's graphs make
shorter.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks import ROOT, cuda, machine, results
from benchmarks.gpu.cases import SHAPES, SMOKE_SHAPES, Scale, make_case, make_mesh, sizes_of
from benchmarks.gpu.library import Library
from benchmarks.report import machine_line, show, table
from benchmarks.results import Json
from jax_smfree.bench.programs import compiled

# In the order in which a round trip launches them; and where rows are few.
KERNELS = (
    ("dispatch send", "Route"),
    ("dispatch send", "Pack"),
    ("dispatch recv", "Place"),
    ("dispatch recv", "Scatter"),
    ("combine send", "LayOut"),
    ("combine send", "Pack"),
    ("combine recv", "Gather"),
)
KERNELS_OF_FEW_ROWS = (
    ("dispatch send", "RouteAndPack"),
    ("dispatch recv", "PlaceAndScatter"),
    ("combine send", "LayOutAndPack"),
    ("combine recv", "Gather"),
)
ROUND_TRIPS = 3  # the last one counts
METRICS = {
    "us": "gpu__time_duration.sum",
    "bytes_read": "dram__bytes_read.sum",
    "bytes_written": "dram__bytes_write.sum",
}


def round_trips(names: list[str]) -> None:
    """What is profiled, of every shape."""
    mesh = make_mesh(1)
    for name in names:
        case = make_case(mesh, name)
        with Library(case, Scale()) as library:
            step = compiled(library.round_trip, mesh)
            for _ in range(ROUND_TRIPS):
                jax.block_until_ready(step(*case.inputs))


def profile(names: list[str]) -> list[Json]:
    """The kernels of the last round trip of each shape, in the order of their launches."""
    kernels = "|".join(sorted({kernel for _, kernel in KERNELS + KERNELS_OF_FEW_ROWS}))
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "ncu.csv")
        command = [machine.cuda_tool("ncu"), "--clock-control", "none", "--cache-control", "none"]
        command += ["--kernel-name", f"regex:^({kernels})$", "--print-kernel-base", "function"]
        command += ["--metrics", ",".join(METRICS.values())]
        command += ["--print-units", "base", "--csv", "--log-file", str(log)]
        command += [sys.executable, "-m", "benchmarks.gpu", "kernels", "--profiled", *names]
        # Of a graph, ncu would have to profile every node as well.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
        env = {**os.environ, "XLA_FLAGS": flags}
        subprocess.run(command, check=True, cwd=ROOT, env=env)
        lines = [line for line in log.read_text().splitlines() if line.startswith('"')]
    launches: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        metrics = launches[row["ID"], row["Kernel Name"]]
        metrics[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    trips: list[list[tuple[str, dict[str, float]]]] = [[]]
    for (_, kernel), metrics in launches.items():
        trips[-1].append((kernel, metrics))
        if kernel == KERNELS[-1][1]:
            trips.append([])
    seen, expected = len(trips) - 1, len(names) * ROUND_TRIPS
    if seen != expected:
        raise RuntimeError(f"ncu has seen {seen} round trips, expected {expected}:\n{lines}")
    entries = []
    for name, trip in zip(names, trips[ROUND_TRIPS - 1 :: ROUND_TRIPS], strict=False):
        phases = KERNELS if len(trip) == len(KERNELS) else KERNELS_OF_FEW_ROWS
        for (phase, _), (kernel, launch) in zip(phases, trip, strict=True):
            numbers = {key: launch[metric] for key, metric in METRICS.items()}
            numbers["us"] /= 1e3
            entries.append({"shape": name, "phase": phase, "kernel": kernel, **numbers})
    return entries


def lines(result: Json) -> Iterator[str]:
    patterns = result["patterns"]
    yield from (f"# Kernels of one rank on {result['machine']['device']}", "")
    yield from (machine_line(result["machine"]), "")
    yield "Plain kernels that move the rows of the first shape in the patterns of the phases, GB/s"
    yield from ("read plus written:", "")
    yield from table(patterns, [[f"{rate:,.0f}" for rate in patterns.values()]])
    yield "Time and bytes of device memory of the kernels, of the last of several round trips:"
    yield ""
    head = ["shape", "phase", "kernel", "µs", "MB read", "MB written", "GB/s"]
    yield from table(head, map(_row, result["kernels"]))


def _row(entry: Json) -> list[str]:
    us, read, written = (entry[key] for key in METRICS)
    moved = [f"{us:.1f}", f"{read / 1e6:.1f}", f"{written / 1e6:.1f}"]
    rate = f"{(read + written) / us / 1e3:,.0f}"
    return [entry["shape"], entry["phase"], f"`{entry['kernel']}`", *moved, rate]


def show_all(result: Json, path: Path) -> None:
    show(path, lines(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", help=f"default {' '.join(SHAPES)}")
    parser.add_argument("--profiled", nargs="+", help=argparse.SUPPRESS)  # the program under ncu
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    if options.profiled or options.smoke:
        round_trips(options.profiled or list(SMOKE_SHAPES))
        return
    names = options.shapes or list(SHAPES)
    rows, hidden, *_ = sizes_of(names[0])
    kernels = profile(names)  # before this process uses the GPU
    patterns = cuda.run("row_patterns", rows, 2 * hidden)  # bfloat16
    described = machine.describe_gpus(options.commit)
    result: Json = {"machine": described, "patterns": patterns, "kernels": kernels}
    with results.folder(options) as folder:
        path = folder / f"gpu-kernels-{results.slug(described['device'])}.json"
        results.write(path, result)
        show_all(result, path)
