# SPDX-License-Identifier: Apache-2.0
"""The compute of the experts: a SwiGLU MLP, for one matrix or for groups of rows."""

import jax
from jax import Array

from jax_smfree.nn.matmul import GroupedMatmul, grouped_matmul
from jax_smfree.nn.params import SwigluParams


def mlp(x: Array, params: SwigluParams) -> Array:
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202): [T, H] -> [T, H]."""
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
    is, ``d.x`` and ``d.group_sizes`` of a dispatch and the experts of this rank.
    """
    gate = grouped_matmul(x, experts.gate, group_sizes)
    up = grouped_matmul(x, experts.up, group_sizes)
    return grouped_matmul(jax.nn.silu(gate) * up, experts.down, group_sizes)
