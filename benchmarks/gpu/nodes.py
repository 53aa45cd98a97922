# SPDX-License-Identifier: Apache-2.0
"""The hierarchical mode beside the direct one, a process per rank: bytes between nodes, times.

    CUDA_VISIBLE_DEVICES=0,0,1,1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.25 \\
        CUDA_DEVICE_MAX_CONNECTIONS=32 python -m benchmarks.gpu nodes     some minutes
    python -m benchmarks.gpu nodes --load R.json        the table of an earlier run
    python -m benchmarks.gpu nodes --smoke              on CPUs: that it works

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
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import apart, machine, results
from benchmarks.gpu import measures, node_bytes
from benchmarks.gpu.cases import SHAPES, SMOKE, SMOKE_SHAPES, Case, Scale, make_case, make_mesh
from benchmarks.gpu.library import Library
from benchmarks.gpu.node_bytes import BETWEEN_NODES, DIRECT, HIERARCHICAL, MODES
from benchmarks.gpu.report import CALLS
from benchmarks.gpu.timing import Gemms, copy_rate, prepare, summary
from benchmarks.report import Row, comparison, find, machine_line, show
from benchmarks.results import Json, Session
from jax_smfree.testing import World
from jax_smfree.testing.environment import visible_gpus

ROUNDS = 2
GEMM_COUNTS = (1, 3)
COUNTERS = (*BETWEEN_NODES.values(), "rows_relayed", "bytes_relayed")
WAITING_PHASES = ("dispatch_recv", "combine_send", "total")  # in hierarchical mode
# Of rows of bfloat16 that were rounded up to three times on their way; a lost sum is far above.
MAX_RELATIVE_ERROR = 2e-2
LEGEND = """\
The ratio is hierarchical over direct: below 1 the hierarchical mode has less.
*between nodes*: MB that one operation sends from one node to another, all ranks together, as the
library counts them. *expected*: the same, computed from the routing: a row with at least one expert
in another node crosses once to each rank that it needs there (direct), or once to that node
(hierarchical); in a dispatch with ids and weights of its experts. *relayed*: what relays sent on
inside the nodes, in a dispatch and a combine.
Times are medians in microseconds, the better ones of the rounds, which alternate between the modes.
*call*: host time of a call, back to back. *device*: from the start of its first phase to the end of
its last one. *phase*: device time, where the rows have long arrived at the end of the first leg; in
the hierarchical mode dispatch_recv and combine_send contain the relay and the wait for the second
leg. Both are those of rank 0. *adds*: device time that a dispatch adds to a chain of products of
8192 × 8192 which runs between its send and its recv. *hidden*: the share of a lone dispatch's time
outside of its phases, so of its waiting, that is gone there."""


def measure(path: str, settings: Json) -> None:
    """In each process of a run: all shapes in one mode. Process 0 keeps the results."""
    apart.join()
    mesh = make_mesh(jax.device_count())
    scale = SMOKE if settings["smoke"] else Scale(traces=12)
    session = Session(
        Path(path if jax.process_index() == 0 else os.devnull),
        machine.describe_gpus(settings["commit"]),
        budget_s=300,
    )
    result, gemms = session.result, None
    session.part(result, "copy_rate", copy_rate, mesh, scale)
    if mesh.devices.flat[0].platform != "cpu":
        gemms = Gemms(mesh, scale)
        session.part(result, "gemms", gemms.measure)
    for name in settings["shapes"]:
        print(f"{settings['mode']}, {name}", flush=True)
        case = make_case(mesh, name)
        result["shapes"][name] = described = case.describe()
        session.part(described, "measured", _measure_mode, case, scale, settings, session, gemms)
    session.save()


def _measure_mode(
    into: Json, case: Case, scale: Scale, settings: Json, session: Session, gemms: Gemms | None
) -> None:
    """One shape in one mode. Nothing is timed if the round trip is wrong."""
    part, world = session.part, World(jax.process_index(), jax.process_count())
    world.enter(case.shape.name)
    per_node, mode = settings["ranks_per_node"], settings["mode"]
    with Library(case, scale, ranks_per_node=per_node, mode=mode) as library:
        into["memory"] = library.group.memory_report()
        into["bytes"] = {"expected": node_bytes.expected(case, per_node, mode)}
        _count_bytes(into["bytes"], library, world)
        part(into, "native", measures.native, library)
        if library.tracer and gemms:
            gb_s = session.result["copy_rate"].get("gb_s", 1.0)  # of floors that are not shown
            part(into, "phases", measures.phases, library, gemms, gb_s)
            if case.shape.name == settings["shapes"][0]:
                part(into, "overlap", _overlap, library, gemms, into["native"], into["phases"])


def _count_bytes(into: Json, library: Library, world: World) -> None:
    """Over all ranks, of one dispatch and one combine."""
    into["relative_error"] = _relative_error(library, world)
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


def _relative_error(library: Library, world: World) -> float:
    """Of a round trip through experts that do nothing, x * sum of weights. The worst rank's."""

    def compare(x: Array, topk_idx: Array, weights: Array) -> Array:
        out = library.round_trip(x, topk_idx, weights).astype(jnp.float32)
        wanted = x.astype(jnp.float32) * weights.sum(axis=1, keepdims=True)
        return (jnp.linalg.norm(out - wanted) / jnp.linalg.norm(wanted))[None]

    errors = prepare(library.case.mesh, {"": (compare, *library.case.inputs)})[""]()
    mine = max(float(np.asarray(shard.data)[0]) for shard in errors.addressable_shards)
    # Of a NaN, which is no JSON, the error is as large as can be.
    return max(world.exchange(mine if np.isfinite(mine) else 1e9, "error", 30))


def _overlap(into: Json, library: Library, gemms: Gemms, native: Json, phases: Json) -> None:
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


def rows(run: Json) -> Iterator[Row]:
    """MB, rows, µs or shares of one run of one mode; of what failed, nothing."""
    for shape, described in run["shapes"].items():
        found = described.get("measured", {})
        yield from ((shape, *row) for row in _byte_rows(found.get("bytes", {})))
        yield from ((shape, *row) for row in _time_rows(found))


def _byte_rows(found: Json) -> Iterator[tuple[str, float]]:
    if not found.get("counted"):
        return
    for operation, counter in BETWEEN_NODES.items():
        yield f"between nodes: {operation}, MB", found["counted"][counter] / 1e6
        yield f"expected: {operation}, MB", found["expected"][counter] / 1e6
    yield "relayed: rows", found["counted"]["rows_relayed"]
    yield "relayed: MB", found["counted"]["bytes_relayed"] / 1e6


def _time_rows(found: Json) -> Iterator[tuple[str, float]]:
    for what, *keys in (("call", "p50"), ("device", "on_device", "p50")):
        for name in CALLS:
            if (us := find(found, "native", name, *keys)) is not None:
                yield f"{what}: {name}", us
    for name, phase in found.get("phases", {}).items():
        if isinstance(phase, dict):
            yield f"phase: {name}", phase["p50"]
    for entry in found.get("overlap", {}).get("dispatch", []):
        yield f"adds: dispatch around {entry['gemms']} products", entry["adds_us"]
        if "hidden" in entry:
            yield f"hidden: dispatch around {entry['gemms']} products", entry["hidden"]


def lines(result: Json) -> Iterator[str]:
    described = next(run for mode in MODES for run in result[mode])["machine"]
    ranks, per_node, gpus = (result[n] for n in ("processes", "ranks_per_node", "gpu_of_rank"))
    yield from ("# The hierarchical mode beside the direct one", "")
    yield from (machine_line(described, len(set(gpus))), "")
    yield f"{ranks} ranks, a process each, as {ranks // per_node} nodes of {per_node}."
    shared = len(set(gpus)) < len(gpus)
    where = f"The ranks 0 to {len(gpus) - 1} are on the GPUs {', '.join(gpus)}"
    if shared:
        yield f"{where}: **they share GPUs**, where processes take turns of some milliseconds. So"
        yield "times that contain a wait for another rank are left out here; the JSON has them."
    else:
        yield f"{where}, each on one of its own."
    yield from ("", LEGEND, "")

    def shown(what: str) -> bool:
        """Not what only says how ranks that share a GPU take turns."""
        kind, _, name = what.partition(": ")
        waits = kind in ("call", "device", "adds", "hidden") or name in WAITING_PHASES
        return not (waits and shared)

    yield from comparison(result, (DIRECT, HIERARCHICAL), rows, shown)


def show_all(result: Json, path: Path) -> None:
    show(path, lines(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=4, help="ranks; default 4")
    parser.add_argument("--ranks-per-node", type=int, default=2, help="default 2")
    parser.add_argument("--shapes", nargs="+", help=f"default {' '.join(SHAPES[:2])}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--timeout", type=float, default=300, help="of a run of a mode, seconds")
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    count, per_node = options.processes, options.ranks_per_node
    if count % per_node:
        raise SystemExit(
            f"got --processes {count} and --ranks-per-node {per_node}, expected a multiple of it"
        )
    settings = {
        "ranks_per_node": per_node,
        "commit": options.commit,
        "shapes": options.shapes or list(SMOKE_SHAPES if options.smoke else SHAPES[:2]),
        "smoke": options.smoke,
    }
    platform = "cpu" if options.smoke else "cuda"
    variants = [
        apart.Variant(
            mode, measure, {**settings, "mode": mode}, count, 1, platform, options.timeout
        )
        for mode in MODES
    ]
    gpus = [f"cpu{i}" for i in range(count)] if options.smoke else visible_gpus()[:count]
    result: Json = {"processes": count, "ranks_per_node": per_node, "gpu_of_rank": gpus}
    with results.folder(options) as folder:
        path = apart.by_turns(
            variants,
            options.rounds,
            result,
            lambda m: folder / f"gpu-nodes-{results.slug(m['device'])}-x{len(set(gpus))}.json",
        )
        show_all(result, path)
    if result["failed"]:
        raise SystemExit(1)
