# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine on the GPUs of one process: phases, whole calls, overlap, an MoE layer.

    python benchmarks/gpu.py                    all shapes, all GPUs, some minutes
    python benchmarks/gpu.py --shapes first     the first shape only
    python benchmarks/gpu.py --load R.json      tables and pictures of an earlier run
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
        python benchmarks/gpu.py --smoke        that it works; the numbers mean nothing

Writes a JSON, which is complete up to wherever a run ends, a Markdown file and two pictures (where
matplotlib is installed). A part that fails leaves its error there, and the others go on. What every
number means is said above its table (``_gpu_table.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _gpu_crossover
import _gpu_machine
import _gpu_moe
import _gpu_peers
import _gpu_table
import _gpu_training
import jax
from _gpu_cases import SHAPES, SMOKE, SMOKE_SHAPES, Case, Scale, make_case, make_mesh
from _gpu_library import opened
from _gpu_table import COPY_ENGINE, DEFAULT
from _gpu_timing import Gemms, Json, copy_rate, launch

HERE = Path(__file__).parent
SM_PUSH = "SM push"
# Options of EpConfig by what moves the rows; the default leaves it to the library.
MOVERS: dict[str, Json] = {
    DEFAULT: {"sm_push_bytes": None},
    COPY_ENGINE: {"sm_push_bytes": 0},
    SM_PUSH: {"sm_push_bytes": 2**40},
}


class Session:
    """The results of a run, on disk after every part, and the time that is left for more."""

    def __init__(self, path: Path, machine: Json, budget_s: float) -> None:
        self.path = path
        self.result: Json = {"machine": machine, "shapes": {}}
        self._start, self._budget_s = time.perf_counter(), budget_s

    def part(self, place: Json, name: str, measure: Callable[..., None], *args: Any) -> None:
        """``place[name]`` is what ``measure`` puts into it, and its error if it fails."""
        into = place[name] = {}
        start = time.perf_counter()
        if start - self._start > self._budget_s:
            into["skipped"] = f"the budget of {self._budget_s:.0f} s was spent"
            return
        try:
            measure(into, *args)
        except Exception as error:
            into["error"] = f"{type(error).__name__}: {error}"
            print(f"  {name}: {into['error'].splitlines()[0]}")
        into["took_s"] = round(time.perf_counter() - start, 1)
        print(f"  {name}: {into['took_s']} s", flush=True)
        self.save()

    def save(self) -> None:
        self.result["took_s"] = round(time.perf_counter() - self._start, 1)
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")


def measure_mover(
    into: Json, case: Case, scale: Scale, session: Session, gemms: Gemms, overlap: bool, name: str
) -> None:
    """One way to move rows. Nothing is timed if the check fails."""
    part, result = session.part, session.result
    with opened(case, scale, **MOVERS[name]) as library:
        into["check"] = {}
        library.check(into["check"])
        part(into, "native", library.native)
        if library.tracer:
            part(into, "phases", library.phases, gemms, result["copy_rate"]["gb_s"])
        if library.tracer and overlap:
            egress = _gpu_machine.egress_gb_s(result["link_ceilings"], case.shape.name)
            part(into, "overlap", library.overlap, gemms, into["phases"], egress)


def describe(case: Case) -> Json:
    return {
        **dataclasses.asdict(case.shape),
        "capacity": case.shape.capacity,
        "wire_bytes": case.wire_bytes,
        "logical_bytes": case.logical_bytes,
        "message_bytes": case.message_bytes,
        "movers": {},
        "peers": {},
    }


def measure(session: Session, ranks: int, names: list[str], scale: Scale) -> None:
    """What matters most comes first, for all shapes: the budget may end before all is done."""
    mesh = make_mesh(ranks)
    result, part = session.result, session.part
    gemms, cases = Gemms(mesh, scale), [make_case(mesh, name) for name in names]
    result["ranks"] = ranks
    result["shapes"] = {case.shape.name: describe(case) for case in cases}
    part(result, "copy_rate", copy_rate, mesh, scale)
    part(result, "launch", launch, mesh, scale)
    part(result, "gemms", gemms.measure)
    part(result, "link_ceilings", _gpu_machine.link_ceilings, cases)

    def each(title: str, kind: str | None, measure_one: Callable[..., None], *args: Any) -> None:
        for case in cases:
            shape = case.shape.name
            print(shape, flush=True)
            place = result["shapes"][shape]
            part(place[kind] if kind else place, title, measure_one, case, scale, *args)

    def each_mover(name: str) -> None:
        # The default is one of the others: the overlap is theirs.
        each(name, "movers", measure_mover, session, gemms, name != DEFAULT, name)

    each_mover(DEFAULT)
    each_mover(COPY_ENGINE)
    each("all_gather", "peers", _gpu_peers.measure, "all_gather")
    each("moe", None, _gpu_moe.measure)
    each("training", None, _gpu_training.measure, gemms)
    ways = {name: MOVERS[name] for name in (COPY_ENGINE, SM_PUSH)}
    part(result, "crossover", _gpu_crossover.measure, mesh, scale, ways)
    each_mover(SM_PUSH)
    for name in list(_gpu_peers.PEERS)[1:]:
        each(name, "peers", _gpu_peers.measure, name)


def show(result: Json, path: Path) -> None:
    """Markdown and pictures beside the JSON; the verdict on the targets last, on the terminal."""
    text = "\n".join(_gpu_table.lines(result))
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    try:
        import _gpu_plot
    except ImportError as error:
        print(f"no pictures: {error}")
    else:
        for picture in _gpu_plot.save(result, path):
            print(f"wrote {picture}")
    print(f"wrote {path} and {path.with_suffix('.md').name}\n")
    print("\n".join(_gpu_table.verdict(result)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="the first GPUs; default all")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["all"],
        help=f"all, first, or ROWSxHIDDEN:KofEXPERTS; default {' '.join(SHAPES)}",
    )
    parser.add_argument("--budget", type=float, default=330, help="seconds; then no part starts")
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results")
    parser.add_argument("--commit", help="of the sources, where they are not in a git checkout")
    parser.add_argument("--smoke", action="store_true", help="tiny; nothing is kept without --out")
    parser.add_argument("--load", type=Path, help="shows an earlier JSON instead of measuring")
    options = parser.parse_args()
    if options.load:
        show(json.loads(options.load.read_text()), options.load)
        return
    known = SMOKE_SHAPES if options.smoke else SHAPES
    names = {"all": list(known), "first": [known[0]]}.get(options.shapes[0], options.shapes)
    ranks = options.ranks or jax.device_count()
    machine = _gpu_machine.describe(options.commit)
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or (Path(scratch) if options.smoke else HERE / "results")
        folder.mkdir(parents=True, exist_ok=True)
        session = Session(folder / f"gpu-{device}-x{ranks}.json", machine, options.budget)
        measure(session, ranks, names, SMOKE if options.smoke else Scale())
        session.save()
        show(session.result, session.path)


if __name__ == "__main__":
    main()
