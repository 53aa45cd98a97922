# SPDX-License-Identifier: Apache-2.0
"""What multiplies groups of rows with matrices of their own: ours, JAX's and others'."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jax_smfree import nn

Multiply = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

DENSE = "dense"
RAGGED_DOT_FLAGS = {
    "xla_gpu_experimental_use_ragged_dot_grouped_gemm": True,
    "xla_gpu_experimental_use_ragged_dot_fusion": True,
}


class Candidate(NamedTuple):
    name: str
    make: Callable[[], Multiply]
    slow: bool = False  # measured after all others
    options: dict[str, bool] | None = None  # of the compiler


def _dense(x: Any, w: Any, group_sizes: Any) -> Any:
    return x @ w


def _jax_mosaic_ops() -> Multiply:
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


def _tokamax_ragged_dot() -> Multiply:
    import tokamax

    return tokamax.ragged_dot


CANDIDATES = (
    Candidate(DENSE, lambda: _dense),
    Candidate("jax_smfree.nn.grouped_matmul", lambda: nn.grouped_matmul),
    Candidate("jax.experimental.pallas.ops.gpu", _jax_mosaic_ops),
    Candidate("tokamax.ragged_dot", _tokamax_ragged_dot),
    Candidate("ragged_dot", lambda: jax.lax.ragged_dot, slow=True),
    Candidate("ragged_dot, XLA's flags for it", lambda: jax.lax.ragged_dot, True, RAGGED_DOT_FLAGS),
)
