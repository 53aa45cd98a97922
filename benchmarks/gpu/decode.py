# SPDX-License-Identifier: Apache-2.0
"""Few rows, as a decode has them: each phase, whole operations, and a step of all MoE layers.

    python -m benchmarks.gpu decode                 some minutes
    python -m benchmarks.gpu decode --load R.json   the table of an earlier run
    python -m benchmarks.gpu decode --smoke         that it works, also without GPUs

By number of rows per rank, with the mover that the library chooses and with rows stored by the
kernels. Phases are those of rows that have long arrived; an operation is from the first block of
its send to the last one of its recv. Both in device time.

A round trip of 128 rows is repeated 10,000 times for its longest (``jitter.py``).

A step is as many layers as DeepSeek-V3 has, one after the other in one program, over the library
and over all_gather, with the same router, experts and grouped matmul. All have the weights of one
layer, which no cache holds. There are 16 experts on each GPU, as on one of 16.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import machine, results
from benchmarks.gpu import jitter, measures, moe
from benchmarks.gpu.cases import SMOKE, SMOKE_SHAPES, Case, Scale, make_case, make_mesh
from benchmarks.gpu.library import Library
from benchmarks.gpu.measures import DEFAULT, SM_PUSH
from benchmarks.gpu.timing import Gemms, Run, batch_times, copy_rate, summary
from benchmarks.gpu.trace import KERNELS
from benchmarks.report import errors, find, machine_line, not_measured, number, show, table
from benchmarks.results import Json, Session
from jax_smfree import nn

ROWS = (1, 8, 32, 128, 512)
STEP_ROWS = (1, 32, 128, 512)  # most of their time is compiling
JITTER_ROWS = 128
SHAPE = "7168:8of256"
BUDGET_S = 300
LAYERS, SMOKE_LAYERS = 58, 3
EXPERTS_PER_RANK = 16
# The columns: a name, and where its numbers stand under a mover.
COLUMNS = {
    **{name.replace("_", " "): ("phases", name) for name in KERNELS},
    "four phases": ("phases", "total"),
    "dispatch": ("native", "dispatch", "on_device"),
    "combine": ("native", "combine", "on_device"),
    "round trip": ("native", "round_trip", "on_device"),
    "dispatch, fp8": ("fp8", "rows", "on_device"),
    "kept": ("fp8", "kept", "on_device"),
}


def step_of_layers(into: Json, case: Case, scale: Scale, layers: int) -> None:
    """Microseconds per layer, of both ways; launches are the operations that XLA has left."""
    model = moe.Model(case, scale.expert_width, scale.expert_width)
    most = case.shape.ranks * case.shape.rows * min(case.shape.top_k, case.shape.local_experts)
    with Library(case, scale, recv_capacity=None) as library:

        def ours(params: nn.MoeParams, x: Array) -> Array:
            return nn.moe_layer(library.group.token(), params, x)[1]

        gathered = functools.partial(
            moe.gathered_layer, dataclasses.replace(case.shape, needed=most)
        )

        def step(layer: moe.Layer, params: nn.MoeParams, x: Array) -> Array:
            @jax.jit
            def block(params: nn.MoeParams, x: Array) -> Array:
                norm = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=1) + 1e-6)
                return x + layer(params, (x * norm[:, None]).astype(x.dtype))

            for _ in range(layers):
                x = block(params, x)
            return x

        ways = {"jax_smfree": ours, "all_gather": gathered}
        runs = model.compiled({name: functools.partial(step, way) for name, way in ways.items()})
        into["layers"] = layers
        for name, run in runs.items():
            times = [time / layers for time in batch_times(run, scale.calls // 2, scale.batches)]
            into[name] = {**summary(times), "launches": round(launches(run) / layers, 1)}


def launches(run: Run) -> int:
    """Operations of the compiled program that start something on the device."""
    text: str = run.func.as_text()  # type: ignore[attr-defined]
    _, _, entry = text.partition("ENTRY ")
    starts = r"= \S+ (fusion|custom-call|copy|all-gather(-start)?|reduce-scatter(-start)?|sort)\("
    return len(re.findall(starts, entry))


def measure(session: Session, smoke: bool) -> None:
    scale, mesh = (SMOKE if smoke else Scale()), make_mesh(jax.device_count())
    result, gemms = session.result, Gemms(mesh, scale)
    result |= {"ranks": mesh.size, "link_ceilings": {}}
    session.part(result, "copy_rate", copy_rate, mesh, scale)
    for name in SMOKE_SHAPES if smoke else [f"{rows}x{SHAPE}" for rows in ROWS]:
        print(name, flush=True)
        case = make_case(mesh, name)
        shape = result["shapes"][case.shape.name] = {**case.describe(), "movers": {}}
        for mover in (DEFAULT, SM_PUSH):
            args = case, scale, session, gemms, False, mover
            session.part(shape["movers"], mover, measures.mover, *args)
    case = make_case(mesh, SMOKE_SHAPES[-1] if smoke else f"{JITTER_ROWS}x{SHAPE}")
    session.part(result, "jitter", jitter.measure, case, scale, smoke)
    steps = result["steps"] = {}
    for rows in (4,) if smoke else STEP_ROWS:
        hidden, experts = (128, 4) if smoke else (7168, EXPERTS_PER_RANK)
        case = make_case(mesh, f"{rows}x{hidden}:{2 if smoke else 8}of{experts * mesh.size}")
        layers = SMOKE_LAYERS if smoke else LAYERS
        session.part(steps, case.shape.name, step_of_layers, case, scale, layers)
    session.save()


def lines(result: Json) -> Iterator[str]:
    yield from (f"# Few rows on {result['ranks']} × {result['machine']['device']}", "")
    yield from (machine_line(result["machine"], result["ranks"]), "")
    yield from ("Microseconds of device time, medians:", "")
    yield from table(["shape", "mover", *COLUMNS], _rows(result["shapes"]))
    if spreads := list(jitter.rows(result.get("jitter", {}))):
        shape = f"{JITTER_ROWS}x{SHAPE}"
        yield from (f"Microseconds of round trips, {shape}, and cores kept busy by movers:", "")
        yield from table(jitter.HEADER, spreads)
    if steps := result.get("steps"):
        yield from ("Microseconds per layer of a step, medians, and its launches:", "")
        header = ["shape", "jax_smfree", "launches", "all_gather", "launches", "speed-up"]
        yield from table(header, map(_step_row, steps.items()))
    yield from not_measured(errors(result))


def _step_row(named: tuple[str, Json]) -> list[str]:
    name, found = named
    ours, theirs = found.get("jax_smfree", {}), found.get("all_gather", {})
    cells = [number(way.get(what), 1) for way in (ours, theirs) for what in ("p50", "launches")]
    both = ours and theirs
    return [name, *cells, number(theirs["p50"] / ours["p50"], 2) if both else "–"]


def _rows(shapes: Json) -> Iterator[list[str]]:
    for name, shape in shapes.items():
        for mover, found in shape["movers"].items():
            medians = (find(found, *path, "p50") for path in COLUMNS.values())
            yield [name, mover, *(number(median, 1) for median in medians)]


def show_all(result: Json, path: Path) -> None:
    show(path, lines(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    with results.folder(options) as folder:
        described = machine.describe_gpus(options.commit)
        path = folder / results.file_of_gpus("decode", described)
        session = Session(path, described, BUDGET_S)
        measure(session, options.smoke)
        show_all(session.result, path)
