# SPDX-License-Identifier: Apache-2.0
"""The hierarchical mode beside the direct one, a process per rank: bytes between nodes, times.

    CUDA_VISIBLE_DEVICES=0,0,1,1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.25 \\
        CUDA_DEVICE_MAX_CONNECTIONS=32 python benchmarks/gpu_nodes.py     some minutes
    python benchmarks/gpu_nodes.py --load R.json        the table of an earlier run
    python benchmarks/gpu_nodes.py --smoke              on CPUs: that it works

The first ``--processes`` of the visible GPUs are those of the ranks, and ``--ranks-per-node`` of
these, one after the other, are a node, wherever they are: nodes are reached by NVSHMEM's puts in
both modes. A GPU that is named several times is shared by its ranks. Their pools have to fit into
it, hence the fraction; and their processes take turns, so that a wait for another rank takes
whatever it takes. Above, the ranks of a node share a GPU, and the nodes are connected by NVLink;
with 0,1,0,1 it is the other way round.

The modes run by turns in new processes. Writes a JSON and a Markdown file, anew after every run, so
that they have whatever was measured before it ends. Nothing in here is a collective of XLA's, since
NCCL refuses ranks that share a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
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
import jax.numpy as jnp
import numpy as np
from _gpu_cases import (
    SHAPES,
    SMOKE,
    SMOKE_SHAPES,
    Case,
    GpuShape,
    Scale,
    make_mesh,
    random_rows,
    sizes_of,
)
from _gpu_library import Library, opened
from _gpu_timing import Gemms, Json, copy_rate, prepare, summary
from jax import Array
from jax.sharding import Mesh

from gpu import Session, describe
from jax_smfree.bench.cases import Inputs, wire_rows
from jax_smfree.bench.programs import sharded
from jax_smfree.testing import World, initialize, launch
from jax_smfree.testing.environment import visible_gpus

HERE = Path(__file__).parent
DIRECT, HIERARCHICAL = MODES = "direct", "hierarchical"
ROUNDS = 2
GEMM_COUNTS = (1, 3)
ALIGNMENT = 128  # of each part of a message, csrc/protocol/layout.h
COUNTERS = (
    "dispatch_internode_bytes",
    "combine_internode_bytes",
    "rows_relayed",
    "bytes_relayed",
)
WAITING_PHASES = ("dispatch_recv", "combine_send", "total")  # in hierarchical mode
# Of rows of bfloat16 that were rounded up to three times on their way; a lost sum is far above.
MAX_RELATIVE_ERROR = 2e-2
LEGEND = """\
The ratio is direct over hierarchical: above 1 the hierarchical mode has less.
*between nodes*: MB that one operation sends from one node to another, all ranks together, as the
library counts them. *expected*: the same, computed from the routing: a row with at least one expert
in another node crosses once to each rank that it needs there (direct), or once to that node
(hierarchical); in a dispatch with ids and weights of its experts. *relayed*: what relays sent on
inside the nodes, in a dispatch and a combine.
Times are medians in microseconds, the better ones of the rounds, which alternate between the modes.
*call*: host time of a call, back to back. *device*: from the begin of its first phase to the end of
its last one. *phase*: device time, where the rows have long arrived at the end of the first leg; in
the hierarchical mode dispatch_recv and combine_send contain the relay and the wait for the second
leg. Both are those of rank 0. *adds*: device time that a dispatch adds to a chain of products of
8192 × 8192 which runs between its send and its recv. *hidden*: the share of a lone dispatch's time
outside of its phases, so of its waiting, that is gone there."""


# ---- what is expected ----------------------------------------------------------------------------


def make_case(mesh: Mesh, text: str, seed: int = 0) -> tuple[Case, np.ndarray]:
    """As `_gpu_cases.make_case`, but that no process compares its arrays with the others' (by a
    collective); and the experts of all rows [R*T, K]."""
    rows, hidden, top_k, experts = sizes_of(text)
    shape = GpuShape(mesh.size, rows, top_k, experts, hidden, "bfloat16")
    rng = np.random.default_rng(seed)
    total = shape.ranks * rows
    drawn = np.argpartition(rng.random((total, experts), np.float32), top_k - 1, axis=1)
    topk_idx = drawn[:, :top_k].astype(np.int32)
    weights = rng.random((total, top_k), np.float32)
    per_rank = np.bincount(topk_idx.ravel() // shape.local_experts, minlength=shape.ranks)
    shape = dataclasses.replace(shape, needed=int(per_rank.max()))

    def put(value: np.ndarray) -> Array:
        return jax.make_array_from_callback(value.shape, sharded(mesh), lambda at: value[at])

    sent = wire_rows(shape, Inputs(drawn, topk_idx, weights))
    x = random_rows(mesh, (total, hidden), seed)
    return Case(shape, mesh, sent, x, put(topk_idx), put(weights)), topk_idx


def crossing_rows(shape: GpuShape, topk_idx: np.ndarray, per_node: int, mode: str) -> np.ndarray:
    """Rows of each message that leaves a node: [R, ranks or nodes], zero where none does."""
    place_size = per_node if mode == HIERARCHICAL else 1  # ranks that a message is for
    places = np.arange(shape.ranks // place_size)
    place = (topk_idx // (shape.local_experts * place_size)).reshape(shape.ranks, shape.rows, -1)
    rows = (place[..., None] == places).any(axis=2).sum(axis=1)
    leaves = places * place_size // per_node != np.arange(shape.ranks)[:, None] // per_node
    return np.where(leaves, rows, 0)


def expected_bytes(shape: GpuShape, topk_idx: np.ndarray, per_node: int, mode: str) -> Json:
    """Of one dispatch and one combine, by the name of their counter, and the rows that cross."""
    rows = crossing_rows(shape, topk_idx, per_node, mode)

    def aligned(row_bytes: int) -> int:
        return int((-(-rows * row_bytes // ALIGNMENT) * ALIGNMENT).sum())

    moved = aligned(shape.row_bytes)
    beside = 2 * aligned(4 * shape.top_k)  # int32 expert ids, float32 weights
    return {COUNTERS[0]: moved + beside, COUNTERS[1]: moved, "rows": int(rows.sum())}


# ---- in each process -----------------------------------------------------------------------------


def relative_error(library: Library, world: World) -> float:
    """Of a round trip through experts that do nothing, x * sum of weights. The worst rank's."""

    def compare(x: Array, topk_idx: Array, weights: Array) -> Array:
        out = library.round_trip(x, topk_idx, weights).astype(jnp.float32)
        wanted = x.astype(jnp.float32) * weights.sum(axis=1, keepdims=True)
        return (jnp.linalg.norm(out - wanted) / jnp.linalg.norm(wanted))[None]

    errors = prepare(library.case.mesh, {"": (compare, *library.case.inputs)})[""]()
    mine = max(float(np.asarray(shard.data)[0]) for shard in errors.addressable_shards)
    # Of a NaN, which is no JSON, the error is as large as can be.
    return max(world.exchange(mine if np.isfinite(mine) else 1e9, "error", 30))


def count_bytes(into: Json, library: Library, expected: Json, world: World) -> None:
    """Over all ranks, of one dispatch and one combine."""
    into["expected"] = expected
    into["relative_error"] = relative_error(library, world)
    library.group.check()
    if not into["relative_error"] <= MAX_RELATIVE_ERROR:
        raise AssertionError(f"the round trip is wrong: {into}")
    run = prepare(library.case.mesh, {"": (library.round_trip, *library.case.inputs)})[""]
    jax.block_until_ready(run())
    before = library.group.stats()
    jax.block_until_ready(run())
    after = library.group.stats()
    mine = {name: after[name] - before[name] for name in COUNTERS}
    each = world.exchange(mine, "bytes", 30)
    into["counted"] = {name: sum(counts[name] for counts in each) for name in COUNTERS}


def overlap(into: Json, library: Library, gemms: Gemms, native: Json, phases: Json) -> None:
    """What a dispatch adds to a chain of products, against one that runs alone."""
    arguments = (*library.case.inputs, gemms.a, gemms.w)
    programs = {"apart": library.apart, "dispatch": library.around_dispatch}
    runs = prepare(
        library.case.mesh,
        {
            f"{name} {count}": (functools.partial(program, count), *arguments)
            for name, program in programs.items()
            for count in GEMM_COUNTS
        },
    )
    send, recv = "dispatch_send", "dispatch_recv"
    phases_us = phases[send]["p50"] + phases[recv]["p50"]
    waiting_us = native["dispatch"]["on_device"]["p50"] - phases_us
    into.update(phases_us=phases_us, waiting_us=waiting_us, dispatch=[])
    for count in GEMM_COUNTS:
        chains = library.record(runs[f"apart {count}"])
        alone = summary([r.between_us(recv, "combine_send", outer=False) for r in chains])
        recordings = library.record(runs[f"dispatch {count}"])
        together = summary([r.between_us(send, recv, outer=True) for r in recordings])
        adds_us = together["p50"] - alone["p50"]
        entry = {"gemms": count, "alone": alone, "together": together, "adds_us": adds_us}
        if waiting_us > 0:
            entry["hidden"] = round(1 - (adds_us - phases_us) / waiting_us, 4)
        into["dispatch"].append(entry)
    library.group.check()


def measure_mode(
    into: Json, case: Case, options: Json, session: Session, gemms: Gemms | None, expected: Json
) -> None:
    """One shape in one mode. Nothing is timed if the round trip is wrong."""
    scale, part, world = scale_of(options), session.part, World(*place())
    world.enter(case.shape.name)
    layout = {"ranks_per_node": options["ranks_per_node"], "mode": options["mode"]}
    with opened(case, scale, **layout) as library:
        into["memory"] = library.group.memory_report()
        into["bytes"] = {}
        count_bytes(into["bytes"], library, expected, world)
        part(into, "native", library.native)
        if library.tracer and gemms:
            gb_s = session.result["copy_rate"].get("gb_s", 1.0)  # of floors that are not shown
            part(into, "phases", library.phases, gemms, gb_s)
            if case.shape.name == options["shapes"][0]:
                part(into, "overlap", overlap, library, gemms, into["native"], into["phases"])


def place() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def scale_of(options: Json) -> Scale:
    return SMOKE if options["smoke"] else Scale(traces=12)


def measure(options: Json) -> None:
    """In each process of a run: all shapes in one mode. Process 0 keeps the results."""
    initialize()
    scale, mesh = scale_of(options), make_mesh(jax.device_count())
    path = Path(options["path"] if jax.process_index() == 0 else os.devnull)
    session = Session(path, _gpu_machine.describe(options["commit"]), 300)
    result, gemms = session.result, None
    session.part(result, "copy_rate", copy_rate, mesh, scale)
    if mesh.devices.flat[0].platform != "cpu":
        gemms = Gemms(mesh, scale)
        session.part(result, "gemms", gemms.measure)
    for name in options["shapes"]:
        print(f"{options['mode']}, {name}", flush=True)
        case, topk_idx = make_case(mesh, name)
        result["shapes"][name] = described = describe(case)
        expected = expected_bytes(case.shape, topk_idx, options["ranks_per_node"], options["mode"])
        args = case, options, session, gemms, expected
        session.part(described, "measured", measure_mode, *args)
    session.save()


# ---- the table -----------------------------------------------------------------------------------


def rows(run: Json) -> Iterator[tuple[str, str, float]]:
    """(shape, what, MB, rows, µs or share) of one run of one mode; of what failed, nothing."""
    for shape, described in run["shapes"].items():
        found = described.get("measured", {})
        yield from ((shape, *row) for row in _byte_rows(found.get("bytes", {})))
        yield from ((shape, *row) for row in _time_rows(found))


def _byte_rows(found: Json) -> Iterator[tuple[str, float]]:
    counted, expected = found.get("counted"), found.get("expected")
    if not counted or not expected:
        return
    for operation, counter in zip(("dispatch", "combine"), COUNTERS, strict=False):
        yield f"between nodes: {operation}, MB", counted[counter] / 1e6
        yield f"expected: {operation}, MB", expected[counter] / 1e6
    yield "relayed: rows", counted["rows_relayed"]
    yield "relayed: MB", counted["bytes_relayed"] / 1e6


def _time_rows(found: Json) -> Iterator[tuple[str, float]]:
    native = {name: t for name, t in found.get("native", {}).items() if name != "timeline"}
    native = {name: times for name, times in native.items() if isinstance(times, dict)}
    for name, times in native.items():
        yield f"call: {name}", times["p50"]
    for name, times in native.items():
        if "on_device" in times:
            yield f"device: {name}", times["on_device"]["p50"]
    for name, phase in found.get("phases", {}).items():
        if isinstance(phase, dict):
            yield f"phase: {name}", phase["p50"]
    for entry in found.get("overlap", {}).get("dispatch", []):
        yield f"adds: dispatch around {entry['gemms']} products", entry["adds_us"]
        if "hidden" in entry:
            yield f"hidden: dispatch around {entry['gemms']} products", entry["hidden"]


def best(runs: list[Json]) -> dict[tuple[str, str], float]:
    """The shortest time, or largest share, of all rounds; numbers of bytes are always the same."""
    found: dict[tuple[str, str], float] = {}
    for run in runs:
        for shape, what, value in rows(run):
            choose = max if what.startswith("hidden") else min
            found[shape, what] = choose(value, found.get((shape, what), value))
    return found


def errors_of(where: str, tree: Any) -> Iterator[str]:
    """What went wrong, and where, in process 0."""
    if isinstance(tree, dict):
        if "error" in tree:
            yield f"{where}: {str(tree['error']).splitlines()[0]}"
        for name, branch in tree.items():
            yield from errors_of(f"{where}, {name}", branch)
    elif isinstance(tree, list):
        for number, branch in enumerate(tree):
            yield from errors_of(f"{where} {number}", branch)


def machine_of(result: Json) -> Json:
    machine: Json = (result[DIRECT] + result[HIERARCHICAL])[0]["machine"]
    return machine


def machine_line(result: Json) -> str:
    machine = machine_of(result)
    processes, per_node, gpus = (result[n] for n in ("processes", "ranks_per_node", "gpu_of_rank"))
    count, driver = len(set(gpus)), machine["gpu"].get("driver_version")
    return (
        f"{processes} ranks, a process each, as {processes // per_node} nodes of {per_node}, on "
        f"{count} × {machine['device']}{f', driver {driver}' if driver else ''}, "
        f"jax {machine['jax']}, commit {machine['commit']}, {machine['date']}."
    )


def sharing_line(result: Json) -> str:
    gpus = result["gpu_of_rank"]
    where = f"The ranks 0 to {len(gpus) - 1} are on the GPUs {', '.join(gpus)}"
    if not share_gpus(result):
        return f"{where}, each on one of its own."
    return (
        f"{where}: **they share GPUs**, where processes take turns of some milliseconds. So times "
        "that contain a wait for another rank are left out here; the JSON has them."
    )


def share_gpus(result: Json) -> bool:
    """Whether a GPU has several ranks."""
    return len(set(result["gpu_of_rank"])) < len(result["gpu_of_rank"])


def is_shown(what: str, result: Json) -> bool:
    """Not what only says how ranks that share a GPU take turns."""
    kind, _, name = what.partition(": ")
    waits = kind in ("call", "device", "adds", "hidden") or name in WAITING_PHASES
    return not (waits and share_gpus(result))


def lines(result: Json) -> Iterator[str]:
    yield from ("# The hierarchical mode beside the direct one", "")
    yield from (machine_line(result), "", sharing_line(result), "", LEGEND, "")
    yield f"| shape | what | {DIRECT} | {HIERARCHICAL} | ratio |"
    yield "|---|---|---:|---:|---:|"
    direct, hierarchical = best(result[DIRECT]), best(result[HIERARCHICAL])
    for shape, what in direct | hierarchical:
        if not is_shown(what, result):
            continue
        values = [found.get((shape, what)) for found in (direct, hierarchical)]
        texts = ["–" if value is None else f"{value:.5g}" for value in values]
        one, other = values
        ratio = f"{one / other:.3f}" if one and other and not what.startswith("hidden") else ""
        yield f"| {shape} | {what} | {' | '.join(texts)} | {ratio} |"
    found = [
        *errors_of(DIRECT, result[DIRECT]),
        *errors_of(HIERARCHICAL, result[HIERARCHICAL]),
        *result["failed"],
    ]
    if found:
        yield from ("", "Went wrong:", "", *(f"- {line}" for line in found))


# ---- the parent ----------------------------------------------------------------------------------


def run_mode(options: argparse.Namespace, mode: str, result: Json) -> None:
    """One run of one mode, into ``result``: whatever was measured before it failed, too."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "path": str(Path(scratch, "result.json")),
            "mode": mode,
            "ranks_per_node": options.ranks_per_node,
            "commit": options.commit,
            "shapes": options.shapes,
            "smoke": options.smoke,
        }
        try:
            done = launch(
                [__file__, "--measure"],
                args=[json.dumps(settings)],
                processes=options.processes,
                devices_per_process=1,
                platform="cpu" if options.smoke else "cuda",
                timeout_s=options.timeout,
                follow=sys.stdout,
            )
        finally:
            with contextlib.suppress(OSError, ValueError):  # none, or half of one
                result[mode].append(json.loads(Path(settings["path"]).read_text()))
    print(f"{mode}: {done.elapsed_s:.0f} s", flush=True)
    if not done.ok:
        why = "timed out" if done.timed_out else f"rank {done.first_failed} failed first"
        result["failed"].append(f"{mode}: {why} ({done.elapsed_s:.0f} s)")
    if not done.ok or list(errors_of(mode, result[mode][-1:])):
        print(done.summary(), flush=True)


def write(result: Json, folder: Path) -> Path | None:
    """The JSON and its table, where there is anything yet."""
    if not result[DIRECT] + result[HIERARCHICAL]:
        return None
    device = re.sub(r"[^a-z0-9]+", "-", machine_of(result)["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-nodes-{device}-x{len(set(result['gpu_of_rank']))}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines(result)) + "\n")
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4, help="ranks; default 4")
    parser.add_argument("--ranks-per-node", type=int, default=2, help="default 2")
    parser.add_argument("--shapes", nargs="+", help=f"default {' '.join(SHAPES[:2])}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--timeout", type=float, default=300, help="of a run of a mode, seconds")
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results")
    parser.add_argument("--commit", help="of the sources, where they are not in a git checkout")
    parser.add_argument("--smoke", action="store_true", help="tiny; nothing is kept without --out")
    parser.add_argument("--load", type=Path, help="shows an earlier JSON instead of measuring")
    options = parser.parse_args()
    options.shapes = options.shapes or list(SMOKE_SHAPES if options.smoke else SHAPES[:2])
    if options.processes % options.ranks_per_node:
        parser.error("--processes has to be a multiple of --ranks-per-node")
    return options


def main() -> None:
    options = parse()
    if options.load:
        print("\n".join(lines(json.loads(options.load.read_text()))))
        return
    count = options.processes
    gpus = [f"cpu{i}" for i in range(count)] if options.smoke else visible_gpus()[:count]
    result: Json = {
        "processes": count,
        "ranks_per_node": options.ranks_per_node,
        "gpu_of_rank": gpus,
        **{mode: [] for mode in MODES},
        "failed": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or (Path(scratch) if options.smoke else HERE / "results")
        try:
            for mode in MODES * options.rounds:
                run_mode(options, mode, result)
                write(result, folder)
        except KeyboardInterrupt:
            result["failed"].append("interrupted")
        if path := write(result, folder):
            print("\n".join(lines(result)))
            print(f"wrote {path} and {path.with_suffix('.md').name}")
    if result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(json.loads(sys.argv[2]))
    else:
        main()
