# SPDX-License-Identifier: Apache-2.0
"""Grouped matmuls on one GPU: which one should the MoE layers take?

    python -m benchmarks.gpu matmul           some minutes
    python -m benchmarks.gpu matmul --tune    the kernels of `jax_smfree.nn.hopper` with other tiles
    python -m benchmarks.gpu matmul --smoke   that it works; kernels for GPUs fail without one

Times the forward pass and forward and backward together, in bfloat16, of what multiplies groups of
rows with matrices of their own; group sizes are random, and 5 % of the rows belong to no group.
Each candidate is checked against float32 matmuls, and again with NaN in the rows of no group, which
must reach nothing else. ``dense`` is one matmul of as many operations. Writes a JSON and a Markdown
file.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import machine, results
from benchmarks.gpu.matmul_candidates import CANDIDATES, DENSE, Candidate, Multiply
from benchmarks.report import errors, machine_line, not_measured, number, show, table
from benchmarks.results import Json, Session
from jax_smfree.nn import hopper

TAIL = 0.05  # share of rows that belong to no group
TOLERANCE = 1e-2  # relative Frobenius norm, of bfloat16 results
BUDGET_S = 210
SLOW_S = 0.1  # what takes longer is timed once
TILES = ((128, 256, 64, 4), (128, 128, 64, 6), (256, 128, 64, 4), (128, 192, 64, 4))
TILES += ((128, 256, 64, 3), (128, 128, 128, 3))
KERNELS = ("x w", "dy w^T", "x^T dy")


class Shape(NamedTuple):
    rows: int
    hidden: int
    width: int
    groups: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.hidden}x{self.width}, {self.groups} groups"

    @property
    def used_rows(self) -> int:
        return int(self.rows * (1 - TAIL))

    @property
    def operations(self) -> int:
        return 2 * self.used_rows * self.hidden * self.width


class Operands(NamedTuple):
    x: Array  # [rows, hidden]
    w: Array  # [groups, hidden, width]
    group_sizes: Array
    dy: Array  # [rows, width]


SHAPES = (Shape(65536, 7168, 2048, 64), Shape(16384, 4096, 3584, 16), Shape(65536, 2048, 1024, 32))
SMOKE_SHAPES = (Shape(256, 64, 32, 4),)


def make_operands(shape: Shape, seed: int = 0) -> Operands:
    generator = np.random.default_rng(seed)
    sizes = generator.multinomial(shape.used_rows, generator.dirichlet([8.0] * shape.groups))

    @jax.jit
    def arrays(key: Array) -> Any:
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (shape.rows, shape.hidden), jnp.bfloat16)
        w = jax.random.normal(keys[1], (shape.groups, shape.hidden, shape.width), jnp.bfloat16)
        dy = jax.random.normal(keys[2], (shape.rows, shape.width), jnp.bfloat16)
        return x, w * shape.hidden**-0.5, dy

    x, w, dy = arrays(jax.random.key(seed))
    return Operands(x, w, jnp.asarray(sizes, jnp.int32), dy)


def forward_and_backward(multiply: Multiply, x: Any, w: Any, group_sizes: Any, dy: Any) -> Any:
    out, pullback = jax.vjp(lambda x, w: multiply(x, w, group_sizes), x, w)
    return out, *pullback(dy)


def milliseconds(function: Callable[[], Any]) -> float:
    def once(repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            result = function()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repeat

    jax.block_until_ready(function())
    first = once(1)
    return 1e3 * (first if first > SLOW_S else min(once(5) for _ in range(4)))


def relative_errors(found: Any, operands: Operands) -> dict[str, float]:
    """Of a few groups, against float32."""
    x, w, group_sizes, dy = operands
    matmul = functools.partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32)
    ends = np.cumsum(group_sizes)
    worst = {"out": 0.0, "dx": 0.0, "dw": 0.0}
    for group in (0, len(ends) // 2, len(ends) - 1):
        rows = slice(int(ends[group] - group_sizes[group]), int(ends[group]))
        xs, dys, ws = (a.astype(jnp.float32) for a in (x[rows], dy[rows], w[group]))
        pairs = {
            "out": (found[0][rows], matmul(xs, ws)),
            "dx": (found[1][rows], matmul(dys, ws.T)),
            "dw": (found[2][group], matmul(xs.T, dys)),
        }
        for name, (got, want) in pairs.items():
            error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
            # Of a NaN, which is no JSON, the error is as large as can be.
            worst[name] = max(worst[name], float(jnp.nan_to_num(error, nan=1e9)))
    return worst


def has_nan(found: Any, used_rows: int) -> bool:
    out, dx, dw = found
    parts = out[:used_rows], dx[:used_rows], dw
    return bool(sum(jnp.isnan(part).sum() for part in parts))


def measure(into: Json, candidate: Candidate, shape: Shape, operands: Operands) -> None:
    multiply, dense = candidate.make(), candidate.name == DENSE
    if dense:
        x, w, group_sizes, dy = operands
        operands = Operands(x[: shape.used_rows], w[0], group_sizes, dy[: shape.used_rows])
    both = functools.partial(forward_and_backward, multiply)
    forward, both = (jax.jit(f, compiler_options=candidate.options) for f in (multiply, both))
    into["forward_ms"] = milliseconds(lambda: forward(*operands[:3]))
    into["forward_tflops"] = shape.operations / into["forward_ms"] / 1e9
    into["both_ms"] = milliseconds(lambda: both(*operands))
    into["both_tflops"] = 3 * shape.operations / into["both_ms"] / 1e9
    if not dense:
        into["errors"] = relative_errors(both(*operands), operands)
        x, dy = (a.at[shape.used_rows :].set(jnp.nan) for a in (operands.x, operands.dy))
        into["nan_leaks"] = has_nan(both(*operands._replace(x=x, dy=dy)), shape.used_rows)


def measure_tiles(into: Json, tile: tuple[int, ...], shape: Shape, operands: Operands) -> None:
    """TFLOP/s of each kernel alone."""
    x, w, group_sizes, dy = operands
    options = {"num_sms": jax.devices()[0].core_count, "tiles": hopper.Tiles(*tile)}
    matmul = functools.partial(hopper.grouped_matmul, **options)
    calls = (
        (matmul, x, w),
        (functools.partial(matmul, transpose=True), dy, w),
        (functools.partial(hopper.grouped_outer_product, **options), x, dy),
    )
    for name, (kernel, *args) in zip(KERNELS, calls, strict=True):
        call = functools.partial(jax.jit(kernel), *args, group_sizes)
        into[name] = shape.operations / milliseconds(call) / 1e9


def compare(session: Session, shapes: tuple[Shape, ...]) -> None:
    """The slow candidates after all others."""
    for slow, shape in itertools.product((False, True), shapes):
        print(shape, flush=True)
        place, operands = session.result["shapes"].setdefault(str(shape), {}), make_operands(shape)
        for candidate in (c for c in CANDIDATES if c.slow is slow):
            session.part(place, candidate.name, measure, candidate, shape, operands)


def tune(session: Session, shapes: tuple[Shape, ...]) -> None:
    for shape in shapes:
        print(shape, flush=True)
        place, operands = session.result["shapes"].setdefault(str(shape), {}), make_operands(shape)
        for tile in TILES:
            session.part(place, "x".join(map(str, tile)), measure_tiles, tile, shape, operands)


def _row(name: str, found: Json, dense_ms: float | None) -> list[str]:
    times = [number(found.get(f"{what}_ms")) for what in ("forward", "both")]
    rates = [number(found.get(f"{what}_tflops"), 0) for what in ("forward", "both")]
    both_ms = found.get("both_ms")
    share = f"{dense_ms / both_ms:.0%}" if dense_ms and both_ms else "–"
    check = ""
    if "errors" in found:
        worst = max(found["errors"].values())
        check = f"error {worst:.1e}" + ("" if worst < TOLERANCE else ", **wrong**")
        check += ", **NaN leaks**" if found["nan_leaks"] else ""
    return [name, times[0], rates[0], times[1], rates[1], share, check]


def lines(result: Json) -> Iterator[str]:
    described = result["machine"]
    yield from (f"# Grouped matmuls on {described['device']}", "", machine_line(described), "")
    for shape, found in result["shapes"].items():
        yield from (f"## {shape}", "")
        if DENSE in found:
            dense_ms = found[DENSE].get("both_ms")
            head = ["", "forward ms", "TFLOP/s", "forward and backward ms", "TFLOP/s", "of dense"]
            rows = (_row(name, each, dense_ms) for name, each in found.items())
            yield from table([*head, "check"], rows)
        else:
            rows = ([n, *(number(e.get(k), 0) for k in KERNELS)] for n, e in found.items())
            yield from table(["tiles, TFLOP/s", *KERNELS], rows)
    yield from not_measured(errors(result["shapes"]))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tune", action="store_true", help="tile sizes instead of candidates")
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    if options.load:
        show(options.load, lines(results.load(options.load)))
        return
    described = machine.describe_gpus(options.commit)
    name = "gpu-matmul-tiles" if options.tune else "gpu-matmul"
    with results.folder(options) as folder:
        path = folder / f"{name}-{results.slug(described['device'])}.json"
        session = Session(path, described, BUDGET_S)
        (tune if options.tune else compare)(session, SMOKE_SHAPES if options.smoke else SHAPES)
        show(path, lines(session.result))
