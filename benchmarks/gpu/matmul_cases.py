# SPDX-License-Identifier: Apache-2.0
"""What the grouped matmuls of a benchmark multiply, how each is made ready, and is it right?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu.matmul_candidates import DENSE, Candidate
from benchmarks.results import Json

TAIL = 384  # rows that belong to no group
MASKED = 64  # first rows after the groups, whose dy must be finite for dw alone
TOLERANCE = 1e-2  # relative Frobenius norm, of bfloat16 results
Run = Callable[..., Any]


class Shape(NamedTuple):
    rows: int
    hidden: int
    width: int
    groups: int
    equal: bool = False

    def __str__(self) -> str:
        kind = "equal" if self.equal else "random"
        return f"{self.rows}x{self.hidden}x{self.width}, {self.groups} {kind} groups"

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.hidden * self.width

    def group_sizes(self) -> np.ndarray:
        if self.equal:
            return np.full(self.groups, self.rows // self.groups)
        shares = [1 / self.groups] * self.groups
        return np.random.default_rng(0).multinomial(self.rows, shares)


class Operands(NamedTuple):
    x: Any  # [rows + TAIL, hidden]
    w: Any  # [groups, hidden, width]
    group_sizes: Any
    dy: Any  # [rows + TAIL, width]

    def of(self, what: str) -> tuple[Any, ...]:
        """The arguments of one of `Kernels`."""
        x, w, sizes, dy = self
        return {"forward": (x, w, sizes), "dx": (dy, w, sizes), "dw": (x, dy, sizes)}[what]

    def for_candidate(self, candidate: Candidate) -> Operands:
        if candidate.torch:
            import torch

            return Operands(*(torch.from_dlpack(value) for value in self))
        if candidate.name == DENSE:
            used = int(self.group_sizes.sum())
            return self._replace(x=self.x[:used], w=self.w[0], dy=self.dy[:used])
        return self


SHAPES = (
    Shape(65536, 7168, 2048, 128),
    Shape(65536, 7168, 2048, 128, equal=True),
    Shape(65536, 2048, 7168, 128),
    Shape(65536, 7168, 4096, 128),
    Shape(65536, 7168, 2048, 64),
    Shape(65536, 7168, 2048, 32),
    Shape(1024, 7168, 2048, 128),
)
SMOKE_SHAPES = (Shape(256, 64, 32, 4),)
CHECK_SIZES = (130, 0, 7, 700, 1, 0, 256, 513, 65, 0)
CHECK_WIDTHS = (2048, 4096)  # several tiles for each SM
SMOKE_CHECK_WIDTHS = (64, 32)


def make_operands(hidden: int, width: int, sizes: Any) -> Operands:
    @jax.jit
    def arrays(key: Array) -> Any:
        keys, rows = jax.random.split(key, 3), int(np.sum(sizes)) + TAIL
        x = jax.random.normal(keys[0], (rows, hidden), jnp.bfloat16)
        w = jax.random.normal(keys[1], (len(sizes), hidden, width), jnp.bfloat16)
        dy = jax.random.normal(keys[2], (rows, width), jnp.bfloat16)
        return x, w * hidden**-0.5, dy

    x, w, dy = arrays(jax.random.key(0))
    return Operands(x, w, jnp.asarray(sizes, jnp.int32), dy)


def start(
    pool: ThreadPoolExecutor, candidate: Candidate, operands: Operands
) -> Callable[[], dict[str, Run]]:
    """Compiles for operands like these, side by side; the result waits for it."""

    def program(what: str, function: Any) -> Run:
        if candidate.torch:
            return functools.partial(function)
        jitted = jax.jit(function, compiler_options=candidate.options)
        compiled: Run = jitted.lower(*operands.for_candidate(candidate).of(what)).compile()
        return compiled

    def every() -> dict[str, Any]:
        kernels = {k: f for k, f in candidate.make()._asdict().items() if f is not None}
        return {what: pool.submit(program, what, kernel) for what, kernel in kernels.items()}

    futures = pool.submit(every)
    return lambda: {what: future.result() for what, future in futures.result().items()}


def bind(candidate: Candidate, programs: dict[str, Run], operands: Operands) -> dict[str, Run]:
    own = operands.for_candidate(candidate)
    return {what: functools.partial(each, *own.of(what)) for what, each in programs.items()}


def wait(result: Any) -> None:
    if hasattr(result, "block_until_ready"):
        result.block_until_ready()
    else:
        import torch

        torch.cuda.synchronize()


def as_jax(result: Any) -> Array:
    wait(result)
    return result if isinstance(result, Array) else jnp.from_dlpack(result.contiguous())


def relative_errors(runs: dict[str, Run], operands: Operands, groups: Any) -> dict[str, float]:
    """Of some groups, against float32 in NumPy: XLA would compile and tune each size of a group."""
    x, w, group_sizes, dy = operands
    ends = np.cumsum(group_sizes)
    worst = {}
    for name, run in runs.items():
        found, worst[name] = as_jax(run()), 0.0
        for group in groups:
            rows = slice(int(ends[group] - group_sizes[group]), int(ends[group]))
            xs, dys, ws = (np.asarray(a, np.float32) for a in (x[rows], dy[rows], w[group]))
            got = np.asarray(found[group] if name == "dw" else found[rows], np.float32)
            left, right = {"forward": (xs, ws), "dx": (dys, ws.T), "dw": (xs.T, dys)}[name]
            want = left @ right
            # Of an empty group nothing is left, or the zeros of dw.
            error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
            # Of a NaN, which is no JSON, the error is as large as can be.
            worst[name] = max(worst[name], min(float(np.nan_to_num(error, nan=1e9)), 1e9))
    return worst


def check(candidate: Candidate, widths: tuple[int, int]) -> Json:
    """At a small shape, whose dw alone reads zeros in the first rows after the groups."""
    used, every = sum(CHECK_SIZES), range(len(CHECK_SIZES))
    operands = make_operands(*widths, CHECK_SIZES)
    finite = operands._replace(dy=operands.dy.at[used:].set(0))
    x = operands.x.at[used:].set(jnp.nan)
    leaky = finite._replace(x=x, dy=finite.dy.at[used + MASKED :].set(jnp.nan))
    with ThreadPoolExecutor() as pool:
        programs = start(pool, candidate, operands)()
    small, found = (
        relative_errors(bind(candidate, programs, given), given, every) for given in (finite, leaky)
    )
    return {"small": small, "leaks": [name for name, e in found.items() if not e < TOLERANCE]}
