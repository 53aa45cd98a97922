# SPDX-License-Identifier: Apache-2.0
"""Every kernel of the four phases under NVIDIA's profiler: its time, and the memory it moves.

    python benchmarks/gpu_kernels.py        a minute; needs nvcc, Nsight Compute (ncu) and one GPU

One rank, so that nothing moves beside the kernels and the profiler may run them one by one. Writes
a Markdown file. The times have the launch of a kernel in them, which XLA's graphs make shorter.
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

import _gpu_machine
import jax
from _gpu_cases import SHAPES, Scale, make_case, make_mesh, sizes_of
from _gpu_library import opened

from jax_smfree.bench.programs import compiled

# In the order in which a round trip launches them.
KERNELS = (
    ("dispatch send", "Route"),
    ("dispatch send", "Pack"),
    ("dispatch recv", "Place"),
    ("dispatch recv", "Scatter"),
    ("combine send", "LayOut"),
    ("combine send", "Pack"),
    ("combine recv", "Gather"),
)
ROUND_TRIPS = 3  # the last one counts
TIME, READ, WRITTEN = METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
)


def run(names: list[str]) -> None:
    """What is profiled: round trips of every shape."""
    mesh = make_mesh(1)
    for name in names:
        case = make_case(mesh, name)
        with opened(case, Scale()) as library:
            step = compiled(library.round_trip, mesh)
            for _ in range(ROUND_TRIPS):
                jax.block_until_ready(step(*case.inputs))


def profile(names: list[str]) -> list[dict[str, float]]:
    """By kernel, in the order of their launches."""
    ncu = _gpu_machine.cuda_tool("ncu")
    kernels = "|".join(sorted({kernel for _, kernel in KERNELS}))
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "ncu.csv")
        command = [ncu, "--clock-control", "none", "--cache-control", "none"]
        command += ["--kernel-name", f"regex:^({kernels})$", "--metrics", ",".join(METRICS)]
        command += ["--print-units", "base", "--csv", "--log-file", str(log)]
        # Of a graph, ncu would have to profile every node as well.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
        command += [sys.executable, __file__, "--run", *names]
        subprocess.run(command, check=True, env={**os.environ, "XLA_FLAGS": flags})
        lines = [line for line in log.read_text().splitlines() if line.startswith('"')]
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        found[row["ID"]][row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    expected = len(names) * ROUND_TRIPS * len(KERNELS)
    if len(found) != expected:
        raise RuntimeError(f"ncu has seen {len(found)} launches, expected {expected}:\n{lines}")
    return list(found.values())


def table(
    names: list[str],
    launches: list[dict[str, float]],
    patterns: dict[str, float],
    commit: str | None,
) -> Iterator[str]:
    machine = _gpu_machine.describe(commit)
    yield f"# Kernels of one rank on {machine['device']}\n"
    yield f"{machine['date']}, commit {machine['commit']}, jax {jax.__version__}, "
    yield f"driver {machine['gpu'].get('driver_version')}, by `python benchmarks/gpu_kernels.py`.\n"
    yield "Plain kernels that move the rows of the first shape in the patterns of the phases, GB/s "
    yield "read plus written:\n"
    yield f"| {' | '.join(patterns)} |"
    yield "|---" * len(patterns) + "|"
    yield f"| {' | '.join(f'{rate:,.0f}' for rate in patterns.values())} |\n"
    yield "Time and bytes of device memory of the kernels, of the last of several round trips:\n"
    yield "| shape | phase | kernel | µs | MB read | MB written | GB/s |"
    yield "|---|---|---|---|---|---|---|"
    for i, name in enumerate(names):
        last = ((i + 1) * ROUND_TRIPS - 1) * len(KERNELS)
        for (phase, kernel), launch in zip(KERNELS, launches[last:], strict=False):
            read, written = launch[READ], launch[WRITTEN]
            yield (
                f"| {name} | {phase} | `{kernel}` | {launch[TIME] / 1e3:.1f} | {read / 1e6:.1f} "
                f"| {written / 1e6:.1f} | {(read + written) / launch[TIME]:,.0f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", metavar="ROWSxHIDDEN:KofEXPERTS")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="for sources outside of a git checkout")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.shapes or list(SHAPES)
    if args.run:
        return run(names)
    rows, hidden, *_ = sizes_of(names[0])
    patterns = _gpu_machine.compiled_and_run("row_patterns", rows, 2 * hidden)  # bfloat16
    text = "\n".join(table(names, profile(names), patterns, args.commit)) + "\n"
    print(text)
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    (args.out / f"gpu-kernels-{kind}.md").write_text(text)


if __name__ == "__main__":
    main()
