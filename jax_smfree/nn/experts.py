# SPDX-License-Identifier: Apache-2.0
"""The compute of the experts: a SwiGLU MLP, for one matrix or for groups of rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_smfree._src import arguments
from jax_smfree.nn.matmul import GroupedMatmul, grouped_matmul
from jax_smfree.nn.params import SwigluParams


def mlp(x: Array, params: SwigluParams) -> Array:
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202).

    Shapes: ``x`` [T, H], ``params`` of one MLP -> [T, H], all of one dtype.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes.
    """
    x = arguments.array("mlp", "x", x, ("T", "H"))
    check_swiglu("mlp", "params", params, (), x.shape[1], x.dtype)
    return (jax.nn.silu(x @ params.gate) * (x @ params.up)) @ params.down


def grouped_mlp(
    x: Array,
    group_sizes: Array,
    experts: SwigluParams,
    *,
    grouped_matmul: GroupedMatmul = grouped_matmul,
) -> Array:
    """`mlp` of every group of rows with the weights of its expert.

    Shapes: ``x`` [N, H], ``group_sizes`` int32 [E / R], ``experts`` [E / R, H, F] -> [N, H]; that
    is, ``d.x`` and ``d.group_sizes`` of a dispatch and the experts of this rank; all of one dtype.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes.
    """
    name = "grouped_mlp"
    x = arguments.array(name, "x", x, ("N", "H"))
    group_sizes = arguments.array(name, "group_sizes", group_sizes, ("E / R",), jnp.integer)
    check_swiglu(name, "experts", experts, group_sizes.shape, x.shape[1], x.dtype)
    arguments.function(name, "grouped_matmul", grouped_matmul)

    def multiply(x: Array, w: Array) -> Array:
        shape = (x.shape[0], w.shape[2])
        out = grouped_matmul(x, w, group_sizes)
        return arguments.array(name, "the result of grouped_matmul", out, shape)

    gate, up = multiply(x, experts.gate), multiply(x, experts.up)
    return multiply(jax.nn.silu(gate) * up, experts.down)


def check_swiglu(
    where: str,
    name: str,
    params: SwigluParams,
    leading: tuple[int, ...],
    hidden: int,
    dtype: Any,
) -> None:
    """``params`` are those of an MLP, or of several, of ``hidden`` and ``dtype``."""
    arguments.instance(where, name, params, SwigluParams, "Make it with nn.init_swiglu.")
    gate = arguments.array(where, f"{name}.gate", params.gate, (*leading, hidden, "F"), dtype)
    width = gate.shape[-1]
    arguments.array(where, f"{name}.up", params.up, (*leading, hidden, width), dtype)
    arguments.array(where, f"{name}.down", params.down, (*leading, width, hidden), dtype)
