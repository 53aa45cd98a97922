# SPDX-License-Identifier: Apache-2.0
"""The compute of the experts: a SwiGLU MLP, for one matrix or for groups of rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jax_smfree.nn.params import SwigluParams

# (x [N, H], w [G, H, F], group_sizes int32 [G]) -> [N, F], as jax.lax.ragged_dot: the first
# group_sizes[0] rows times w[0], and so on. Rows past sum(group_sizes) may be anything.
GroupedMatmul = Callable[[Array, Array, Array], Array]


def mlp(x: Array, params: SwigluParams) -> Array:
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202): [T, H] -> [T, H]."""
    return (jax.nn.silu(x @ params.gate) * (x @ params.up)) @ params.down


def grouped_mlp(
    x: Array,
    group_sizes: Array,
    experts: SwigluParams,
    *,
    grouped_matmul: GroupedMatmul = jax.lax.ragged_dot,
) -> Array:
    """`mlp` of every group of rows with the weights of its expert.

    Shapes: ``x`` [N, H], ``group_sizes`` int32 [E / R], ``experts`` [E / R, H, F] -> [N, H]; that
    is, ``d.x`` and ``d.group_sizes`` of a dispatch and the experts of this rank.
    """
    gate = grouped_matmul(x, experts.gate, group_sizes)
    up = grouped_matmul(x, experts.up, group_sizes)
    return grouped_matmul(jax.nn.silu(gate) * up, experts.down, group_sizes)


def block_matmul(x: Array, w: Array, group_sizes: Array, *, block_rows: int) -> Array:
    """A grouped matmul as a batch of equal matmuls, one for every ``block_rows`` rows.

    All group sizes must be multiples of ``block_rows``: create the group with
    ``EpConfig(expert_alignment=block_rows)``. On a CPU, where XLA multiplies every row with every
    expert for ``ragged_dot``, this is the faster one from two experts per rank on.

    Memory: a copy of the weights for each block, so blocks should not be small.

    Raises:
      ValueError: if N is not a multiple of ``block_rows``.
    """
    if x.shape[0] % block_rows:
        raise ValueError(
            f"block_matmul: got {x.shape[0]} rows, expected a multiple of block_rows={block_rows}. "
            "Set EpConfig.expert_alignment to block_rows and recv_capacity to a multiple of it."
        )
    blocks = x.reshape(-1, block_rows, x.shape[1])
    first_rows = jnp.arange(blocks.shape[0], dtype=jnp.int32) * block_rows
    group = jnp.searchsorted(jnp.cumsum(group_sizes), first_rows, side="right")
    group = jnp.minimum(group, w.shape[0] - 1)  # blocks of the empty tail: any expert will do
    out = jnp.einsum("brh,bhf->brf", blocks, w[group])
    return out.reshape(x.shape[0], w.shape[2])
