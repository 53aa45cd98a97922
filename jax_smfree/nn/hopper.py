# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined,abstract"
"""Grouped matrix multiplications for Hopper GPUs, in Pallas.

    grouped_matmul          out[n] = x[n] @ w[g]        for the rows n of group g
    grouped_outer_product   out[g] = x[rows of g]^T @ y[rows of g]

Group g has the next group_sizes[g] rows; groups start and end at any row. Both kernels are one
block per SM, which loops over tiles of the output: a memory warpgroup loads the operands of the
next steps with TMA while two compute warpgroups multiply, each one half of the rows of the tile.
Neither touches rows past sum(group_sizes), apart from what is said about ``y`` below, and their
time does not depend on how many there are.

Traits of the hardware that the code below is made of: TMA loads start at rows that are multiples of
8 (a swizzle atom), and what a load finds past the end of an array is zero; TMA stores have a static
number of rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ATOM = 8  # rows of a swizzle atom
COLUMNS = 64  # of a swizzle atom: 128 bytes
WARPGROUPS = 2  # that compute
MEMORY_REGISTERS = 40  # of a thread that only issues loads; the others get the rest


class Tiles(NamedTuple):
    """Sizes of one step: ``rows`` x ``columns`` of the output, ``depth`` of the contraction."""

    rows: int
    columns: int
    depth: int
    stages: int  # steps whose operands are in shared memory at a time


MATMUL_TILES = Tiles(rows=128, columns=256, depth=64, stages=4)
OUTER_TILES = Tiles(rows=128, columns=256, depth=64, stages=4)


def grouped_matmul(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    num_sms: int,
    transpose: bool = False,
    tiles: Tiles = MATMUL_TILES,
) -> Array:
    """``x`` [N, K], ``w`` [G, K, M] (``transpose``: [G, M, K]), int32 [G] -> [N, M].

    16-bit floats, sums in float32. K is a multiple of 64 and M of 128. Rows of the result past
    ``sum(group_sizes)`` are whatever the memory held.
    """
    num_rows, contracted = x.shape
    columns = w.shape[1] if transpose else w.shape[2]
    table = _row_tiles(group_sizes, num_rows, tiles.rows)
    column_tiles = pl.cdiv(columns, tiles.columns)
    half = tiles.rows // WARPGROUPS

    x_spec = _block((tiles.rows, tiles.depth), lambda k: (0, k))
    w_spec = (
        _block((tiles.columns, tiles.depth), lambda k: (0, k))
        if transpose
        else _block((tiles.depth, tiles.columns), lambda k: (k, 0))
    )

    def kernel(
        count: Any, group: Any, first: Any, begin: Any, end: Any, x: Any, w: Any, out: Any
    ) -> None:
        def pipeline(body: Any, context: Any) -> Any:
            return _pipeline(body, context, contracted // tiles.depth, tiles, (x_spec, w_spec))

        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(_nothing, _nothing).get_allocations(x, w.at[0]),
            staging=_staging(half, x.dtype),
            collective_axes="warpgroup",
        )
        def _(allocations: Any, staging: Any) -> None:
            warpgroup = jax.lax.axis_index("warpgroup")

            @plgpu.nd_loop((count[0] * column_tiles,), collective_axes="sm")
            def _(loop: plgpu.NDLoopInfo) -> None:
                tile = jax.lax.div(loop.index[0], jnp.int32(column_tiles))
                column = jax.lax.rem(loop.index[0], jnp.int32(column_tiles)) * tiles.columns
                first_row = pl.multiple_of(first[tile], ATOM)
                own_row = first_row + warpgroup * half
                begins, ends = begin[tile], end[tile]

                def multiply(_: Any, x_step: Any, w_step: Any, acc: Any) -> Any:
                    w_step = w_step.transpose((1, 0)) if transpose else w_step
                    plgpu.wgmma(acc, x_step.at[pl.ds(warpgroup * half, half)], w_step)
                    plgpu.wgmma_wait(0)
                    return acc

                def store(acc: Any) -> None:
                    # Only rows of this group: the others of the tile belong to its neighbours.
                    skip = jax.lax.clamp(0, begins - own_row, half)
                    size = jax.lax.clamp(0, ends - own_row, half) - skip
                    for part in range(tiles.columns // COLUMNS):
                        slot = staging.at[warpgroup, part % 2]
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        columns = slice(part * COLUMNS, (part + 1) * COLUMNS)
                        slot[...] = acc[:, columns].astype(out.dtype)
                        plgpu.commit_smem()
                        to = out.at[:, pl.ds(column + part * COLUMNS, COLUMNS)]
                        _store_rows(slot, to, own_row, skip, size)

                pipeline(multiply, _accumulate((half, tiles.columns), store))(
                    x.at[pl.ds(first_row, tiles.rows), :],
                    w.at[group[tile], pl.ds(column, tiles.columns), :]
                    if transpose
                    else w.at[group[tile], :, pl.ds(column, tiles.columns)],
                    allocations=allocations,
                )

            plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct((num_rows, columns), x.dtype)
    out: Array = _call(kernel, shape, num_sms, "grouped_matmul")(*table, x, w)
    return out


def grouped_outer_product(
    x: Array, y: Array, group_sizes: Array, *, num_sms: int, tiles: Tiles = OUTER_TILES
) -> Array:
    """``x`` [N, K], ``y`` [N, M], int32 [G] -> [G, K, M]; zero for an empty group.

    16-bit floats, sums in float32. K is a multiple of 128 and M of 64. The last step of a
    group reads up to ``tiles.depth`` rows after it, whose ``x`` is masked and whose ``y`` must
    be finite.
    """
    num_rows, out_rows = x.shape
    columns = y.shape[1]
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    row_tiles = pl.cdiv(out_rows, tiles.rows)
    column_tiles = pl.cdiv(columns, tiles.columns)
    half = tiles.rows // WARPGROUPS

    specs = (
        _block((tiles.depth, tiles.rows), lambda k: (k, 0)),
        _block((tiles.depth, tiles.columns), lambda k: (k, 0)),
    )

    def kernel(begin: Any, end: Any, x: Any, y: Any, out: Any) -> None:
        def pipeline(body: Any, context: Any, steps: Any) -> Any:
            return _pipeline(body, context, steps, tiles, specs)

        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(_nothing, _nothing, jnp.int32(1)).get_allocations(x, y),
            staging=_staging(half, x.dtype),
            collective_axes="warpgroup",
        )
        def _(allocations: Any, staging: Any) -> None:
            warpgroup = jax.lax.axis_index("warpgroup")

            @plgpu.nd_loop((num_groups, row_tiles, column_tiles), collective_axes="sm")
            def _(loop: plgpu.NDLoopInfo) -> None:
                group, row, column = loop.index
                row, column = row * tiles.rows, column * tiles.columns
                begins, ends = begin[group], end[group]
                first_row = jax.lax.div(begins, jnp.int32(ATOM)) * ATOM
                first_row = pl.multiple_of(first_row, ATOM)
                # An empty group has one step, all of it masked, which leaves zeros.
                steps = jnp.maximum(pl.cdiv(ends - first_row, tiles.depth), 1)

                def multiply(index: Any, x_step: Any, y_step: Any, acc: Any) -> Any:
                    own = x_step.at[:, pl.ds(warpgroup * half, half)]
                    at = first_row + index[0] * tiles.depth

                    @pl.when((at < begins) | (at + tiles.depth > ends))
                    def _() -> None:
                        rows = at + plgpu.broadcasted_iota(
                            jnp.int32, (tiles.depth, half), 0, layout=plgpu.Layout.WGMMA
                        )
                        kept = (rows >= begins) & (rows < ends)
                        values = plgpu.layout_cast(own[...], plgpu.Layout.WGMMA)
                        own[...] = jnp.where(kept, values, jnp.zeros_like(values))
                        plgpu.commit_smem()

                    plgpu.wgmma(acc, own.transpose((1, 0)), y_step)
                    plgpu.wgmma_wait(0)
                    return acc

                def store(acc: Any) -> None:
                    for part in range(tiles.columns // COLUMNS):
                        slot = staging.at[warpgroup, part % 2]
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        columns = slice(part * COLUMNS, (part + 1) * COLUMNS)
                        slot[...] = acc[:, columns].astype(out.dtype)
                        plgpu.commit_smem()
                        own_row = row + warpgroup * half
                        to = out.at[
                            group, pl.ds(own_row, half), pl.ds(column + part * COLUMNS, COLUMNS)
                        ]
                        plgpu.copy_smem_to_gmem(slot, to)

                pipeline(multiply, _accumulate((half, tiles.columns), store), steps)(
                    x.at[pl.ds(first_row, num_rows), pl.ds(row, tiles.rows)],
                    y.at[pl.ds(first_row, num_rows), pl.ds(column, tiles.columns)],
                    allocations=allocations,
                )

            plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct((num_groups, out_rows, columns), x.dtype)
    out: Array = _call(kernel, shape, num_sms, "grouped_outer_product")(begins, ends, x, y)
    return out


def _row_tiles(group_sizes: Array, num_rows: int, tile_rows: int) -> tuple[Array, ...]:
    """The tiles of rows, of one group each: (their number, and of each its group, its first row,
    and where the group's rows in it or after it begin and end)."""
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    firsts = begins // ATOM * ATOM
    counts = jnp.where(group_sizes > 0, pl.cdiv(ends - firsts, tile_rows), 0)
    last = jnp.cumsum(counts, dtype=jnp.int32)
    most = pl.cdiv(num_rows + (ATOM - 1) * num_groups, tile_rows) + num_groups
    tile = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(last, tile, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    first = firsts[group] + (tile - (last - counts)[group]) * tile_rows
    return last[-1:], group, first, begins[group], ends[group]


def _store_rows(staged: Any, out: Any, own_row: Any, skip: Any, size: Any) -> None:
    """Rows ``skip`` to ``skip + size`` of ``staged``, as one store for each bit of ``size``."""
    bit = staged.shape[0]
    while bit:

        @pl.when(size & bit != 0)
        def _(skip: Any = skip, bit: int = bit) -> None:
            plgpu.copy_smem_to_gmem(
                staged.at[pl.ds(skip, bit)],
                out.at[pl.ds(own_row + skip, bit)],
                commit_group=False,
            )

        skip = skip + (size & bit)
        bit //= 2
    plgpu.commit_smem_to_gmem_group()


def _accumulate(shape: tuple[int, int], store: Any) -> Any:
    def context(run_pipeline: Any) -> None:
        @functools.partial(pl.run_scoped, acc=plgpu.ACC(shape, jnp.float32))
        def _(acc: Any) -> None:
            run_pipeline(acc)
            store(acc[...])

    return context


def _pipeline(body: Any, context: Any, steps: Any, tiles: Tiles, specs: Any) -> Any:
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=MEMORY_REGISTERS,
        in_specs=specs,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=tiles.stages,
        compute_context=context,
    )


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of functions that say nothing about the allocations of a pipeline."""


def _swizzled(rows: int) -> tuple[plgpu.Transform, ...]:
    return plgpu.TilingTransform((rows, COLUMNS)), plgpu.SwizzleTransform(128)


def _block(shape: tuple[int, int], index_map: Any) -> plgpu.BlockSpec:
    return plgpu.BlockSpec(shape, index_map, transforms=_swizzled(ATOM))


def _staging(rows: int, dtype: Any) -> Any:
    return plgpu.SMEM((WARPGROUPS, 2, rows, COLUMNS), dtype, transforms=_swizzled(1))


def _call(kernel: Any, out: jax.ShapeDtypeStruct, num_sms: int, name: str) -> Any:
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
