# SPDX-License-Identifier: Apache-2.0
"""What multiplies groups of rows with matrices of their own: ours, JAX's and others'."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_smfree import nn

Function = Callable[..., Any]

DENSE = "dense"
OURS = "nn.grouped_matmul"
RAGGED_DOT_FLAGS = {
    "xla_gpu_experimental_use_ragged_dot_grouped_gemm": True,
    "xla_gpu_experimental_use_ragged_dot_fusion": True,
}


class Kernels(NamedTuple):
    """Each with the group sizes as the last argument; None is one that is not measured."""

    forward: Function | None = None  # x [N, H], w [G, H, F] -> [N, F]
    dx: Function | None = None  # dy [N, F], w -> [N, H]
    dw: Function | None = None  # x, dy -> [G, H, F]


class Candidate(NamedTuple):
    name: str
    make: Callable[[], Kernels]
    slow: bool = False  # measured once, and for the first shape only
    options: dict[str, bool] | None = None  # of the compiler
    torch: bool = False  # the functions are of PyTorch, and of its tensors


def _dense() -> Kernels:
    """One matmul of as many operations: ``w`` [H, F]."""
    return Kernels(lambda x, w, _: x @ w, lambda dy, w, _: dy @ w.T, lambda x, dy, _: x.T @ dy)


def _of_multiply(multiply: Function) -> Kernels:
    """Of a function with a gradient, of whose parts XLA leaves out what is not asked for."""

    def dx(dy: Any, w: Any, sizes: Any) -> Any:
        x = jnp.zeros((dy.shape[0], w.shape[1]), dy.dtype)
        return jax.vjp(lambda x: multiply(x, w, sizes), x)[1](dy)[0]

    def dw(x: Any, dy: Any, sizes: Any) -> Any:
        w = jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), x.dtype)
        return jax.vjp(lambda w: multiply(x, w, sizes), w)[1](dy)[0]

    return Kernels(multiply, dx, dw)


def _jax_mosaic_ops() -> Kernels:
    """The kernels that JAX ships. Their dw multiplies masked rows with zero: no NaN there."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    tiles = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=5, grid_block_n=4)
    ragged_dot = functools.partial(ragged_dot_mgpu.ragged_dot, **tiles)
    outer = functools.partial(transposed_ragged_dot_mgpu.transposed_ragged_dot, **tiles)
    return Kernels(
        lambda x, w, sizes: ragged_dot(x, w, group_sizes=sizes),
        lambda dy, w, sizes: ragged_dot(dy, w, group_sizes=sizes, transpose_rhs=True),
        lambda x, dy, sizes: outer(x, dy, group_sizes=sizes),
    )


def _tokamax() -> Kernels:
    """With tiles of our choice: those it starts with are 64 x 64, and its tuning takes minutes."""
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu as op
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu_common as common

    config = common.Config(
        block_m=128,
        block_n=128,
        block_k=64,
        num_stages=4,
        split_k=1,
        persistent=True,
        grid_minor_dim=common.MatmulDimension.N,
        grid_tile_width=4,
    )
    multiply = op.PallasMosaicGpuRaggedDot(
        config=config,
        vjp=functools.partial(
            op.base.vjp,
            dlhs_ragged_dot=op.PallasMosaicGpuRaggedDot(config=config),
            drhs_ragged_dot=op.PallasMosaicGpuRaggedDot(config=config),
        ),
    )
    return _of_multiply(lambda x, w, sizes: multiply(x, w, group_sizes=sizes))


def _torch() -> Kernels:
    """CUTLASS's grouped matmul, which PyTorch brings for Hopper."""
    import torch

    def ends(sizes: Any) -> Any:
        return torch.cumsum(sizes, 0, dtype=torch.int32)

    grouped = torch._grouped_mm
    return Kernels(
        lambda x, w, sizes: grouped(x, w, offs=ends(sizes)),
        lambda dy, w, sizes: grouped(dy, w.transpose(1, 2), offs=ends(sizes)),
        lambda x, dy, sizes: grouped(x.t(), dy, offs=ends(sizes)),
    )


def _quack() -> Kernels:
    """QuACK's kernels in CuTe, through its interface for PyTorch: for JAX it has none of them."""
    import torch
    from quack.gemm_interface import gemm

    def starts(sizes: Any) -> Any:
        return torch.nn.functional.pad(torch.cumsum(sizes, 0, dtype=torch.int32), (1, 0))

    call = functools.partial(gemm, tuned=False)
    return Kernels(
        lambda x, w, sizes: call(x, w, cu_seqlens_m=starts(sizes)),
        lambda dy, w, sizes: call(dy, w.transpose(1, 2), cu_seqlens_m=starts(sizes)),
        lambda x, dy, sizes: call(x.t(), dy, cu_seqlens_k=starts(sizes)),
    )


CANDIDATES = (
    Candidate(DENSE, _dense),
    Candidate(OURS, lambda: _of_multiply(nn.grouped_matmul)),
    Candidate("jax pallas ops", _jax_mosaic_ops),
    Candidate("torch._grouped_mm", _torch, torch=True),
    Candidate("quack.gemm", _quack, torch=True),
    Candidate("tokamax.ragged_dot", _tokamax),
    Candidate("jax.lax.ragged_dot", lambda: _of_multiply(jax.lax.ragged_dot), True),
    Candidate(
        "jax.lax.ragged_dot, XLA's flags for it",
        lambda: _of_multiply(jax.lax.ragged_dot),
        True,
        RAGGED_DOT_FLAGS,
    ),
)
