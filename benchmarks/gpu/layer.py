# SPDX-License-Identifier: Apache-2.0
"""The MoE layer of three models: its time over that of its matmuls, its memory, its kernels.

    python -m benchmarks.gpu layer                 two to three minutes
    python -m benchmarks.gpu layer --load R.json   the tables of an earlier run
    python -m benchmarks.gpu layer --smoke         that it works, also without GPUs

A step is forward and backward with all gradients, in bfloat16. It is that of ``nn.moe_layer`` as it
is, with what docs/moe_layer.md has for keeping less, and of the same layer over all_gather. All are
timed by turns with one dense matmul, because the clock of a busy GPU falls. Before that each one's
output and gradients are compared with the first one's. Writes a JSON and a Markdown file.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks import machine, results
from benchmarks.gpu import kernel_times, moe
from benchmarks.gpu.cases import SMOKE, GpuShape, Scale, make_case, make_mesh, random_rows
from benchmarks.gpu.layer_steps import ALL_GATHER, DEFAULT, kept, layers, memory
from benchmarks.gpu.library import Library
from benchmarks.gpu.timing import Run, by_turns, prepare
from benchmarks.report import errors, find, machine_line, ms, not_measured, number, show, table
from benchmarks.results import Json, Session

BUDGET_S = 140  # then no part starts
TURN_S, SMOKE_TURN_S = 0.08, 0.0
ROUNDS, SMOKE_ROUNDS = 5, 2
DENSE = "dense"


class Widths(NamedTuple):
    """A layer of a model: rows and routing as `make_case` has them, and F of its experts."""

    case: str
    expert: int
    shared: int = 0

    def operations(self, shape: GpuShape) -> int:
        """Of all matmuls of a step, per rank: forward, and twice as many backward."""
        width = 3 * (shape.top_k * self.expert + self.shared) + shape.experts
        return 3 * 2 * shape.rows * shape.hidden * width


SHAPES = {
    "DeepSeek-V3": Widths("8192x7168:8of256", 2048, 2048),
    "Qwen3-235B": Widths("8192x4096:8of128", 1536),
    "Mixtral 8x7B": Widths("8192x4096:2of8", 14336),
}
SMOKE_SHAPES = {
    "with a shared expert": Widths("64x128:2of8", 32, 32),
    "without one": Widths("32x64:4of16", 48),
}


class Layers:
    """The programs of one shape; those that are right are timed."""

    def __init__(self, session: Session, mesh: Mesh, widths: Widths) -> None:
        self._session, self._widths = session, widths
        self._case = make_case(mesh, widths.case)
        self._model = moe.Model(self._case, widths.expert, widths.shared)
        self._shape = self._model.shape()
        self._operations = widths.operations(self._shape)
        self._runs: dict[str, Run] = {}
        self._expected: Any = None  # output and gradients of the first step

    def measure(self, into: Json, smoke: bool) -> None:
        """What matters most comes first, and is timed again with the rest: the budget may end."""
        part, shape = self._session.part, self._shape
        scale = SMOKE if smoke else Scale()
        into |= {**self._case.describe(), "capacity": shape.capacity}
        into["fullest"] = shape.needed - moe.SPARE_ROWS
        into |= {**self._widths._asdict(), "operations": self._operations, "steps": {}}
        # Alone, as XLA chooses a kernel for it by timing some.
        part(into, DENSE, self._dense)
        options = {"differentiable": True, "recv_capacity": shape.capacity}
        with Library(self._case, scale, **options) as library:
            every, first = layers(library, shape), (DEFAULT, ALL_GATHER)
            self._prepare(into["steps"], {name: every[name] for name in first})
            part(into, "turns", self._time, into, smoke)
            if DEFAULT in self._runs:
                part(into, "kernels", kernel_times.measure, self._runs[DEFAULT])
            rest = {name: layer for name, layer in every.items() if name not in first}
            self._prepare(into["steps"], rest)
            part(into, "turns of all", self._time, into, smoke)

    def _dense(self, into: Json) -> None:
        shape, mesh = self._shape, self._case.mesh
        rows, hidden, width = shape.rows * shape.top_k, shape.hidden, self._widths.expert
        x = random_rows(mesh, (mesh.size * rows, hidden), 1)
        w = random_rows(mesh, (mesh.size * hidden, width), 2, hidden**-0.5)
        into.update(rows=rows, operations=2 * rows * hidden * width)
        self._runs[DENSE] = prepare(mesh, {"": (jnp.matmul, x, w)})[""]

    def _prepare(self, into: Json, wanted: dict[str, moe.Layer]) -> None:
        # Nothing runs meanwhile: to load a kernel may have to wait for those that wait for one.
        with ThreadPoolExecutor() as pool:
            compiled = [
                None if self._session.spent else self._model.start(pool, moe.step_of(layer))
                for layer in wanted.values()
            ]
        for (name, layer), each in zip(wanted.items(), compiled, strict=True):
            self._session.part(into, name, self._ready, name, layer, each)

    def _ready(self, into: Json, name: str, layer: moe.Layer, compiled: Future[Any]) -> None:
        into.update(kept(self._model, layer, self._shape))
        executable = compiled.result()
        into.update(memory(executable))
        run = self._model.bound(executable)
        jax.block_until_ready(run())
        result = run()  # XLA records command buffers at the second execution
        if self._expected is None:
            self._expected = result
        else:
            moe.check_same(into, result, self._expected)
        self._runs[name] = run

    def _time(self, into: Json, place: Json, smoke: bool) -> None:
        turn_s, rounds = (SMOKE_TURN_S, SMOKE_ROUNDS) if smoke else (TURN_S, ROUNDS)
        into.update(rounds=rounds)
        for name, times in by_turns(self._runs, turn_s, rounds).items():
            operations = place[DENSE]["operations"] if name == DENSE else self._operations
            found = place[DENSE] if name == DENSE else place["steps"][name]
            found |= {**times, "tflop_s": round(operations / times["p50"] / 1e6, 1)}


def measure(session: Session, smoke: bool) -> None:
    mesh, shapes = make_mesh(jax.device_count()), session.result["shapes"]
    session.result["ranks"] = mesh.size
    for name, widths in (SMOKE_SHAPES if smoke else SHAPES).items():
        print(name, flush=True)
        session.part(shapes, name, measure_shape, session, mesh, widths, smoke)
        gc.collect()  # errors hold arrays in cycles, and the next shape needs the memory


def measure_shape(into: Json, session: Session, mesh: Mesh, widths: Widths, smoke: bool) -> None:
    Layers(session, mesh, widths).measure(into, smoke)


def lines(result: Json) -> Iterator[str]:
    described = result["machine"]
    yield from (f"# MoE layers on {result['ranks']} × {described['device']}", "")
    yield from (f"{machine_line(described, result['ranks'])}; {result['took_s']:.0f} s", "")
    yield from EXPLAINED
    for name, shape in result["shapes"].items():
        yield from (f"## {name}", "")
        if "operations" in shape:
            yield from _sizes(shape)
            yield from table(HEADER, _rows(shape))
            yield from _kernels(shape.get("kernels", {}))
    yield from not_measured(errors(result))


EXPLAINED = """\
A step is forward and backward with all gradients, in milliseconds, median (10th–90th percentile of
turns). *TFLOP/s* are those of each rank's matmuls, forward and twice as many backward, without what
a policy does again. *Over dense* is the step's time over that of as many operations at the rate of
the dense matmul, which was timed by turns with it.

*Kept* are gigabytes per rank that `jax.vjp` keeps from forward to backward, without parameters and
input, by the shapes of the traced program, and those of arrays of received rows among them. XLA
computes a part of them again where it fuses the activation. *Temporary* and *peak* are what XLA has
planned for the compiled step: all of its arrays beside parameters, input, output and gradients, and
together with these. They are allocated before the program runs. What is kept also lies where the
gradients will be written, so *temporary* may be less than *kept*. The buffers of the group are not
in them. The peak of one layer is in its backward pass, which has again what a policy has left out;
in a model each further layer adds what it keeps.

""".splitlines()
HEADER = ["", "ms", "× default", "TFLOP/s", "over dense", "kept", "of rows", "temporary", "peak"]


def _sizes(shape: Json) -> Iterator[str]:
    shared = f", and a shared one of width {shape['shared']}" if shape["shared"] else ""
    yield f"{shape['rows']} rows × {shape['hidden']} per rank, {shape['top_k']} of"
    yield f"{shape['experts']} experts of width {shape['expert']}{shared}:"
    yield f"{shape['operations'] / 1e12:.3g} TFLOP per rank. The fullest rank gets"
    balanced, dense = shape["rows"] * shape["top_k"], shape.get(DENSE, {})
    yield f"{shape['fullest'] / balanced:.3f} times as many rows as in a balanced routing."
    yield f"The dense matmul, of {balanced} × {shape['hidden']} × {shape['expert']}, takes"
    yield from (f"{ms(_times(dense))} ms, which is {number(dense.get('tflop_s'), 0)} TFLOP/s.", "")


def _rows(shape: Json) -> Iterator[list[str]]:
    default, dense = find(shape, "steps", DEFAULT, "p50"), shape.get(DENSE, {})
    at_dense_rate = None  # microseconds of the step's operations
    if "p50" in dense:
        at_dense_rate = shape["operations"] * dense["p50"] / dense["operations"]
    for name, found in shape["steps"].items():
        took = found.get("p50")
        planned = [found.get(f"{what}_bytes") for what in ("temporary", "argument", "output")]
        peak = None if None in planned else sum(planned)
        yield [
            name,
            ms(_times(found)),
            number(took / default if took and default else None, 3),
            number(found.get("tflop_s"), 0),
            number(took / at_dense_rate if took and at_dense_rate else None, 2),
            *(number(found.get(f"{what}_bytes"), 2, 1e-9) for what in ("kept", "kept_of_rows")),
            *(number(value, 2, 1e-9) for value in (planned[0], peak)),
        ]


def _times(found: Json) -> Json | None:
    return found if "p50" in found else None


def _kernels(found: Json) -> Iterator[str]:
    if "groups" in found:
        yield "The default step kernel by kernel, on the first GPU, from JAX's profiler. A recv's"
        yield "kernels wait for its rows. Copies run beside kernels, and so may kernels:"
        yield ""
        yield from table(kernel_times.HEADER, kernel_times.rows(found))
    elif not {"error", "skipped"} & set(found):
        yield from ("No GPU, so there are no kernels in the profile.", "")


def show_all(result: Json, path: Path) -> None:
    show(path, lines(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    with results.folder(options) as folder:
        described = machine.describe_gpus(options.commit)
        path = folder / results.file_of_gpus("layer", described)
        session = Session(path, described, BUDGET_S)
        measure(session, options.smoke)
        show_all(session.result, path)
