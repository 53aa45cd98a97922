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
import json
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


def jax_mosaic_ops(block: int) -> Multiply:
    """The kernels that JAX ships. Their gradient multiplies masked rows with zero: no NaN there."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    tiles = dict(block_m=block, block_n=128, block_k=64, max_concurrent_steps=5, grid_block_n=4)
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


def scan_over_tiles(x: Any, w: Any, group_sizes: Any, tile: int = 512) -> Any:
    """Plain JAX: one dense matmul after the other, each of rows of one group."""
    ends = jnp.cumsum(group_sizes)
    begins = ends - group_sizes
    last = jnp.cumsum(-(group_sizes // -tile))
    steps = jnp.arange(x.shape[0] // tile + w.shape[0])
    group = jnp.minimum(jnp.searchsorted(last, steps, side="right"), w.shape[0] - 1)
    first = begins[group] + (steps - (last - -(group_sizes // -tile))[group]) * tile
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    @jax.checkpoint
    def step(out: Any, at: Any) -> Any:
        group, first = at
        rows = jax.lax.dynamic_slice_in_dim(padded, first, tile) @ w[group]
        old = jax.lax.dynamic_slice_in_dim(out, first, tile)
        kept = first + jnp.arange(tile) < ends[group]
        return jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(kept[:, None], rows, old), first, 0
        ), None

    out = jnp.zeros((padded.shape[0], w.shape[2]), x.dtype)
    return jax.lax.scan(step, out, (group, first))[0][: x.shape[0]]


def dense(x: Any, w: Any, group_sizes: Any) -> Any:
    return x[: int(x.shape[0] * (1 - TAIL)) // 128 * 128] @ w[0]


def flag(name: str) -> dict[str, bool]:
    return {f"xla_gpu_experimental_use_ragged_dot_{name}": True}


# Name, what makes the function, options for the compiler. The slowest comes last.
CANDIDATES: list[tuple[str, Callable[[], Multiply], dict[str, bool]]] = [
    ("dense", lambda: dense, {}),
    ("jax_smfree.nn.grouped_matmul", lambda: grouped_matmul, {}),
    ("jax.experimental mgpu, 128x128", lambda: jax_mosaic_ops(128), {}),
    ("jax.experimental mgpu, 64x128", lambda: jax_mosaic_ops(64), {}),
    ("tokamax.ragged_dot", tokamax_ragged_dot, {}),
    ("scan over tiles of 512 rows", lambda: scan_over_tiles, {}),
    ("ragged_dot, XLA grouped GEMM", lambda: jax.lax.ragged_dot, flag("grouped_gemm")),
    ("ragged_dot, XLA fusion", lambda: jax.lax.ragged_dot, flag("fusion")),
    ("ragged_dot", lambda: jax.lax.ragged_dot, {}),
]


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
    return out, *pullback(dy[: out.shape[0]])


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


def measure(make: Callable[[], Multiply], options: Any, shape: Shape, operands: Operands) -> Any:
    multiply = make()
    x, w, group_sizes, dy = operands
    forward = jax.jit(multiply, compiler_options=options)
    both = jax.jit(functools.partial(forward_and_backward, multiply), compiler_options=options)
    operations = 2 * shape.used_rows * shape.hidden * shape.width
    result: dict[str, Any] = {"forward_ms": milliseconds(lambda: forward(x, w, group_sizes))}
    result["forward_tflops"] = operations / result["forward_ms"] / 1e9
    try:
        result["both_ms"] = milliseconds(lambda: both(*operands))
        result["both_tflops"] = 3 * operations / result["both_ms"] / 1e9
        if multiply is not dense:
            result["errors"] = relative_errors(both(*operands), operands)
            nan = operands._replace(
                x=x.at[shape.used_rows :].set(jnp.nan), dy=dy.at[shape.used_rows :].set(jnp.nan)
            )
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
    for shape in SHAPES:
        operands = make_operands(shape)
        print(shape, flush=True)
        dense_ms = float("nan")
        for name, make, options in CANDIDATES:
            result: dict[str, Any] = {"candidate": name, "shape": shape._asdict()}
            if time.monotonic() - start > BUDGET_S:
                result["error"] = "skipped, out of time"
            else:
                try:
                    result |= measure(make, options, shape, operands)
                except Exception as error:
                    result["error"] = first_line(error)
            yield result
            if "error" in result:
                print(f"  {name:32}{result['error']}", flush=True)
                continue
            both_ms = result.get("both_ms", float("nan"))
            dense_ms = both_ms if name == "dense" else dense_ms
            print(
                f"  {name:32}{result['forward_ms']:8.2f} ms {result['forward_tflops']:4.0f} T"
                f"{both_ms:11.2f} ms {result.get('both_tflops', float('nan')):4.0f} T"
                f"   {dense_ms / both_ms:7.0%}   {verdict(result)}",
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
