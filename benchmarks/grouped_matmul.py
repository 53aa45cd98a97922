# SPDX-License-Identifier: Apache-2.0
"""Grouped matmuls on one GPU: which one should the MoE layers take?

    python benchmarks/grouped_matmul.py --out grouped_matmul.json
    python benchmarks/grouped_matmul.py --tune --out tiles.json

Times the forward pass and forward and backward together, in bfloat16, of what multiplies groups of
rows with matrices of their own; group sizes are random, and 5 % of the rows belong to no group.
Each candidate is checked against float32 matmuls, and again with NaN in the rows of no group, which
must reach nothing else. ``dense`` is one matmul of as many operations. ``--tune`` times the kernels
of `jax_smfree.nn.hopper` one by one with other tile sizes instead.

Only JAX is needed: the package need not be built.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's many lines about ragged_dot's memory

import jax
import jax.numpy as jnp
import numpy as np

PACKAGE = pathlib.Path(__file__).parents[1] / "jax_smfree"
for name, path in {"jax_smfree": PACKAGE, "jax_smfree.nn": PACKAGE / "nn"}.items():
    # Packages without their __init__, which would ask for the compiled module.
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(path)]

from jax_smfree.nn import hopper  # noqa: E402
from jax_smfree.nn.matmul import grouped_matmul  # noqa: E402

RAGGED_DOT_FLAGS = {
    "xla_gpu_experimental_use_ragged_dot_grouped_gemm": True,
    "xla_gpu_experimental_use_ragged_dot_fusion": True,
}
TAIL = 0.05  # share of rows that belong to no group
TOLERANCE = 1e-2  # relative Frobenius norm, of bfloat16 results
BUDGET_S = 210  # after that, candidates are skipped
SLOW_S = 0.1  # what takes longer is timed once

Multiply = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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


class Operands(NamedTuple):
    x: jax.Array  # [rows, hidden]
    w: jax.Array  # [groups, hidden, width]
    group_sizes: jax.Array
    dy: jax.Array  # [rows, width]


SHAPES = (Shape(65536, 7168, 2048, 64), Shape(16384, 4096, 3584, 16), Shape(65536, 2048, 1024, 32))


def jax_mosaic_ops() -> Multiply:
    """The kernels that JAX ships. Their gradient multiplies masked rows with zero: no NaN there."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    tiles = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=5, grid_block_n=4)
    ragged_dot = functools.partial(ragged_dot_mgpu.ragged_dot, **tiles)
    outer = functools.partial(transposed_ragged_dot_mgpu.transposed_ragged_dot, **tiles)

    @jax.custom_vjp
    def multiply(x: Any, w: Any, group_sizes: Any) -> Any:
        return ragged_dot(x, w, group_sizes=group_sizes)

    def backward(residuals: Any, dy: Any) -> Any:
        x, w, group_sizes = residuals
        dx = ragged_dot(dy, w, group_sizes=group_sizes, transpose_rhs=True)
        return dx, outer(x, dy, group_sizes=group_sizes), None

    multiply.defvjp(lambda *args: (multiply(*args), args), backward)
    return multiply


def tokamax_ragged_dot() -> Multiply:
    import tokamax

    return tokamax.ragged_dot


def dense(x: Any, w: Any, group_sizes: Any) -> Any:
    return x @ w


class Candidate(NamedTuple):
    name: str
    make: Callable[[], Multiply]
    slow: bool = False  # measured after all others
    options: dict[str, bool] | None = None  # of the compiler


CANDIDATES = (
    Candidate("dense", lambda: dense),
    Candidate("jax_smfree.nn.grouped_matmul", lambda: grouped_matmul),
    Candidate("jax.experimental.pallas.ops.gpu", jax_mosaic_ops),
    Candidate("tokamax.ragged_dot", tokamax_ragged_dot),
    Candidate("ragged_dot", lambda: jax.lax.ragged_dot, slow=True),
    Candidate("ragged_dot, XLA's flags for it", lambda: jax.lax.ragged_dot, True, RAGGED_DOT_FLAGS),
)


def make_operands(shape: Shape, seed: int = 0) -> Operands:
    generator = np.random.default_rng(seed)
    sizes = generator.multinomial(shape.used_rows, generator.dirichlet([8.0] * shape.groups))

    @jax.jit
    def arrays(key: jax.Array) -> Any:
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


def relative_errors(results: Any, operands: Operands) -> dict[str, float]:
    """Of a few groups, against float32."""
    x, w, group_sizes, dy = operands
    matmul = functools.partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32)
    ends = np.cumsum(group_sizes)
    errors = {"out": 0.0, "dx": 0.0, "dw": 0.0}
    for group in (0, len(ends) // 2, len(ends) - 1):
        rows = slice(int(ends[group] - group_sizes[group]), int(ends[group]))
        xs, dys, ws = (a.astype(jnp.float32) for a in (x[rows], dy[rows], w[group]))
        pairs = {
            "out": (results[0][rows], matmul(xs, ws)),
            "dx": (results[1][rows], matmul(dys, ws.T)),
            "dw": (results[2][group], matmul(xs.T, dys)),
        }
        for name, (got, want) in pairs.items():
            error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
            errors[name] = max(errors[name], float(error)) if error == error else float("nan")
    return errors


def has_nan(results: Any, used_rows: int) -> bool:
    out, dx, dw = results
    parts = out[:used_rows], dx[:used_rows], dw
    return bool(sum(jnp.isnan(part).sum() for part in parts))


def measure(candidate: Candidate, shape: Shape, operands: Operands) -> dict[str, Any]:
    multiply = candidate.make()
    if multiply is dense:
        x, w, group_sizes, dy = operands
        operands = Operands(x[: shape.used_rows], w[0], group_sizes, dy[: shape.used_rows])
    both = functools.partial(forward_and_backward, multiply)
    forward, both = (jax.jit(f, compiler_options=candidate.options) for f in (multiply, both))
    operations = 2 * shape.used_rows * shape.hidden * shape.width
    result: dict[str, Any] = {"forward_ms": milliseconds(lambda: forward(*operands[:3]))}
    result["forward_tflops"] = operations / result["forward_ms"] / 1e9
    try:
        result["both_ms"] = milliseconds(lambda: both(*operands))
        result["both_tflops"] = 3 * operations / result["both_ms"] / 1e9
        if multiply is not dense:
            result["errors"] = relative_errors(both(*operands), operands)
            x, dy = (a.at[shape.used_rows :].set(jnp.nan) for a in (operands.x, operands.dy))
            nan = operands._replace(x=x, dy=dy)
            result["nan_leaks"] = has_nan(both(*nan), shape.used_rows)
    except Exception as error:
        result["backward_error"] = first_line(error)
    return result


def first_line(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
    )


def verdict(result: dict[str, Any]) -> str:
    if "backward_error" in result:
        return result["backward_error"]
    if "errors" not in result:
        return ""
    worst = max(result["errors"].values(), key=lambda error: (error != error, error))
    exact = f"error {worst:.1e}" + ("" if worst < TOLERANCE else " WRONG")
    return exact + (", NaN leaks" if result["nan_leaks"] else "")


def compare(start: float) -> Iterator[dict[str, Any]]:
    print(f"{'':34}{'forward':>17}{'forward+backward':>20}   {'of dense':>8}")
    dense_ms: dict[Shape, float] = {}
    for slow, shape in itertools.product((False, True), SHAPES):
        print(shape, flush=True)
        operands = make_operands(shape)
        for candidate in (c for c in CANDIDATES if c.slow is slow):
            result: dict[str, Any] = {"candidate": candidate.name, "shape": shape._asdict()}
            try:
                if time.monotonic() - start > BUDGET_S:
                    raise TimeoutError("skipped")
                result |= measure(candidate, shape, operands)
            except Exception as error:
                result["error"] = first_line(error)
            yield result
            if "error" in result:
                print(f"  {candidate.name:32}{result['error']}", flush=True)
                continue
            both_ms = result.get("both_ms", float("nan"))
            share = dense_ms.setdefault(shape, both_ms) / both_ms  # dense is the first
            print(
                f"  {candidate.name:32}{result['forward_ms']:8.2f} ms"
                f" {result['forward_tflops']:4.0f} T{both_ms:11.2f} ms"
                f" {result.get('both_tflops', float('nan')):4.0f} T   {share:7.0%}"
                f"   {verdict(result)}",
                flush=True,
            )


def tune(start: float) -> Iterator[dict[str, Any]]:
    """Each kernel alone, with other tiles."""
    tiles = [(128, 256, 64, 4), (128, 128, 64, 6), (256, 128, 64, 4), (128, 192, 64, 4)]
    tiles += [(128, 256, 64, 3), (128, 128, 128, 3)]
    num_sms = jax.devices()[0].core_count
    print(f"{'':34}{'x w':>10}{'dy w^T':>10}{'x^T dy':>10}   TFLOP/s")
    for shape in SHAPES:
        print(shape, flush=True)
        x, w, group_sizes, dy = make_operands(shape)
        operations = 2 * shape.used_rows * shape.hidden * shape.width
        for tile in tiles:
            options = {"num_sms": num_sms, "tiles": hopper.Tiles(*tile)}
            matmul = functools.partial(hopper.grouped_matmul, **options)
            kernels = {
                "matmul": (matmul, x, w),
                "transposed": (functools.partial(matmul, transpose=True), dy, w),
                "outer": (functools.partial(hopper.grouped_outer_product, **options), x, dy),
            }
            result: dict[str, Any] = {"tiles": tile, "shape": shape._asdict()}
            for name, (kernel, *args) in kernels.items():
                if time.monotonic() - start > BUDGET_S:
                    result[name] = "skipped, out of time"
                    continue
                try:
                    call = functools.partial(jax.jit(kernel), *args, group_sizes)
                    result[name] = operations / milliseconds(call) / 1e9
                except Exception as error:
                    result[name] = first_line(error)
            yield result
            rates = (result[name] for name in kernels)
            texts = (f"{r:10.0f}" if isinstance(r, float) else f"  {r}" for r in rates)
            print(f"  {'x'.join(map(str, tile)):32}{''.join(texts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the JSON goes")
    parser.add_argument("--tune", action="store_true", help="tile sizes instead of candidates")
    args = parser.parse_args()
    start = time.monotonic()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    results: list[dict[str, Any]] = []
    for result in (tune if args.tune else compare)(start):
        results.append(result)
        report = {"device": device.device_kind, "jax": jax.__version__, "results": results}
        args.out.write_text(json.dumps(report, indent=1))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
