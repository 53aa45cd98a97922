# SPDX-License-Identifier: Apache-2.0
"""A process per GPU (NVSHMEM) beside one process with all GPUs: calls, phases, overlap.

    python benchmarks/gpu_processes.py                 some minutes
    python benchmarks/gpu_processes.py --load R.json   the table of an earlier run

The same measurements as in ``gpu.py``, by turns in new processes. Of traces a process has its own
ranks only, so the phases of the second form are those of rank 0. Writes a JSON and a Markdown file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _gpu_machine
import jax
from _gpu_cases import SHAPES, Scale, make_case, make_mesh
from _gpu_table import DEFAULT
from _gpu_timing import Gemms, copy_rate

from gpu import Session, describe, measure_mover
from jax_smfree.testing import initialize, launch
from jax_smfree.testing.environment import visible_gpus

HERE = Path(__file__).parent
ONE, MANY = "one process", "a process per GPU"
ROUNDS = 2
LEGEND = """\
Medians in microseconds; the ratio is that of the second form to the first. All numbers of a form
are the better ones of its rounds, which alternate with those of the other form. *calls*: host time
of a call, back to back. *phases*: device time, where the rows have long arrived; of all ranks in
the first form, of rank 0 in the second. *hidden*: share of the transfer that a chain of products
hides."""


def measure(path: Path, names: list[str], commit: str | None) -> None:
    """In each process of one form: everything that is compared."""
    initialize()
    scale, mesh = Scale(), make_mesh(jax.device_count())
    first = jax.process_index() == 0
    session = Session(path if first else Path(os.devnull), _gpu_machine.describe(commit), 300)
    result, gemms = session.result, Gemms(mesh, scale)
    session.part(result, "copy_rate", copy_rate, mesh, scale)
    session.part(result, "gemms", gemms.measure)
    result["link_ceilings"] = {}
    for name in names:
        case = make_case(mesh, name)
        shape = result["shapes"][case.shape.name] = describe(case)
        overlap = name == names[0]
        args = case, scale, session, gemms, overlap, DEFAULT
        session.part(shape["movers"], DEFAULT, measure_mover, *args)
    session.save()


def rows(form: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(shape, what, µs or share) of one run of one form."""
    for shape, found in form["shapes"].items():
        mover = found["movers"][DEFAULT]
        for name in ("dispatch", "combine", "round_trip"):
            yield shape, f"call: {name}", mover["native"][name]["p50"]
        for name, phase in mover["phases"].items():
            if isinstance(phase, dict):
                yield shape, f"phase: {name}", phase["p50"]
        for entry in mover.get("overlap", {}).get("dispatch", []):
            if "hidden" in entry:
                yield shape, f"hidden: dispatch, {entry['gemms']} products", entry["hidden"]


def best(runs: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The shortest time, or largest share, of all rounds."""
    found: dict[tuple[str, str], float] = {}
    for run in runs:
        for shape, what, value in rows(run):
            choose = max if what.startswith("hidden") else min
            found[shape, what] = choose(value, found.get((shape, what), value))
    return found


def lines(result: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    machine = result[ONE][0]["machine"]
    yield "# A process per GPU beside one process"
    yield ""
    yield (
        f"{machine['devices']} × {machine['device']}, driver {machine['gpu']['driver_version']}, "
        f"jax {machine['jax']}, commit {machine['commit']}, {machine['date']}."
    )
    yield ""
    yield LEGEND
    yield ""
    yield f"| shape | what | {ONE} | {MANY} | ratio |"
    yield "|---|---|---:|---:|---:|"
    one, many = best(result[ONE]), best(result[MANY])
    for (shape, what), value in one.items():
        other = many.get((shape, what))
        if other is not None:
            yield f"| {shape} | {what} | {value:.4g} | {other:.4g} | {other / value:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[SHAPES[0], SHAPES[1], SHAPES[4]])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--commit", help="of the sources, where they are not in a git checkout")
    parser.add_argument("--load", type=Path, help="shows an earlier JSON instead of measuring")
    options = parser.parse_args()
    if options.load:
        print("\n".join(lines(json.loads(options.load.read_text()))))
        return
    gpus = len(visible_gpus())
    result: dict[str, list[dict[str, Any]]] = {ONE: [], MANY: []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ROUNDS):
            for form, processes in ((ONE, 1), (MANY, gpus)):
                path = Path(scratch, f"{number}-{processes}.json")
                launch(
                    [__file__, "--measure"],
                    args=[path, options.commit or "", *options.shapes],
                    processes=processes,
                    devices_per_process=gpus // processes,
                    platform="cuda",
                    timeout_s=300,
                    follow=sys.stdout,
                ).check()
                result[form].append(json.loads(path.read_text()))
    device = re.sub(r"[^a-z0-9]+", "-", result[ONE][0]["machine"]["device"].lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu-processes-{device}-x{gpus}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines(result)) + "\n")
    print("\n".join(lines(result)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        _, _, target, revision, *shape_names = sys.argv
        measure(Path(target), shape_names, revision or None)
    else:
        main()
