# SPDX-License-Identifier: Apache-2.0
"""Candidates for the kernels of `jax_smfree.nn.hopper`: the same two functions.

    grouped_matmul          out[n] = x[n] @ w[g]        for the rows n of group g
    grouped_outer_product   out[g] = x[rows of g]^T @ y[rows of g]

Every block is one ring of steps over all of its tiles: its memory warpgroup loads the first steps
of the next tile while the others store the last one, and these two, which multiply 64 rows of a
tile each, may be as many steps apart as the ring has. Two blocks of a cluster load what both
multiply once.

In ``grouped_matmul`` a tile is of the transposed result: the rows of a group are the columns of
the instruction, of which it takes any multiple of 8. So a tile is about as large as what is left
of its group, and not 128 rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.gpu.ring import (
    HALF,
    TILE,
    Ring,
    Tiles,
    block_of_cluster,
    call,
    copy_to_all,
    load_steps,
    multiply_steps,
    run_tiles,
    warpgroup,
    with_ring,
)
from jax_smfree.nn.hopper import ATOM, _store_rows


def grouped_matmul(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    num_sms: int,
    transpose: bool = False,
    tiles: Tiles = Tiles(),  # noqa: B008
) -> Array:
    """As `jax_smfree.nn.hopper.grouped_matmul`."""
    num_rows, contracted = x.shape
    columns = w.shape[1] if transpose else w.shape[2]
    tiles = tiles.for_columns(columns)
    table = _tiles_of_rows(group_sizes, num_rows, tiles)
    of_a_row = columns // (TILE * tiles.blocks)  # tiles, each of all blocks of a cluster
    steps = contracted // tiles.depth
    widths = range(tiles.least, tiles.width + 1, tiles.unit)
    w_step = (TILE, tiles.depth) if transpose else (tiles.depth, TILE)

    def kernel(count: Any, table: Any, x: Any, w: Any, out: Any) -> None:
        def place(index: Any) -> _Place:
            """Of a group's tiles those of the same columns follow each other."""
            row = jax.lax.div(index, jnp.int32(of_a_row))
            base, number = table[row, 0], table[row, 1]
            index = index - base * of_a_row
            tile = base + jax.lax.rem(index, number)
            column = jax.lax.div(index, number) * tiles.blocks + block_of_cluster(tiles)
            return _Place(*(table[tile, i] for i in (2, 3, 4, 5, 6)), column)

        def run(ring: Ring, staging: Any) -> None:
            def load(at: _Place, done: Any) -> Any:
                def of_width(width: int) -> None:
                    def copies(step: Any, slot: Any, ready: Any) -> None:
                        k = pl.ds(step * tiles.depth, tiles.depth)
                        copy_to_all(
                            x.at[pl.ds(pl.multiple_of(at.first, ATOM), width), k],
                            ring.b.at[slot, pl.ds(0, width)],
                            ready,
                            tiles,
                        )
                        rows = pl.ds(at.column * TILE, TILE)
                        source = w.at[at.group, rows, k] if transpose else w.at[at.group, k, rows]
                        plgpu.copy_gmem_to_smem(source, ring.a.at[slot], ready)

                    load_steps(ring, done, steps, copies)

                _switch(at.width, widths, of_width)
                return done + steps

            def multiply(at: _Place, done: Any) -> Any:
                own = pl.ds(warpgroup() * HALF, HALF)

                def of_width(width: int) -> None:
                    def operands(slot: Any) -> tuple[Any, Any]:
                        a = ring.a.at[slot]
                        a = a.at[own] if transpose else a.at[:, own].transpose((1, 0))
                        return a, ring.b.at[slot, pl.ds(0, width)].transpose((1, 0))

                    acc = multiply_steps(ring, width, done, steps, operands)
                    for part, begin in enumerate(range(0, width, HALF)):
                        rows = min(HALF, width - begin)
                        slot = staging.at[warpgroup(), part % 2, pl.ds(0, rows)]
                        plgpu.wait_smem_to_gmem(min(part, 1), wait_read_only=True)
                        values = acc[:, begin : begin + rows].astype(out.dtype)
                        slot.transpose((1, 0))[...] = values
                        plgpu.commit_smem()
                        # Only rows of this group: the others belong to its neighbours.
                        row = at.first + begin
                        skip = jax.lax.clamp(0, at.begin - row, rows)
                        size = jax.lax.clamp(0, at.end - row, rows) - skip
                        to = out.at[:, pl.ds(at.column * TILE + warpgroup() * HALF, HALF)]
                        _store_rows(slot, to, row, skip, size)
                    # Waits for nothing, as two stores are under way at most. But it differs from
                    # width to width, so LLVM does not merge the ends of their code, for which
                    # ptxas would then have too few registers, and let each wgmma wait.
                    plgpu.wait_smem_to_gmem(1 + width // tiles.unit, wait_read_only=True)

                _switch(at.width, widths, of_width)
                return done + steps

            run_tiles(ring, place, count[0] * of_a_row, load, multiply)

        with_ring(run, tiles, w_step, (tiles.width, tiles.depth), x.dtype, (HALF, HALF))

    shape = jax.ShapeDtypeStruct((num_rows, columns), x.dtype)
    out: Array = call(kernel, shape, num_sms, tiles, "grouped_matmul")(*table, x, w)
    return out


def grouped_outer_product(
    x: Array,
    y: Array,
    group_sizes: Array,
    *,
    num_sms: int,
    tiles: Tiles = Tiles(),  # noqa: B008
) -> Array:
    """As `jax_smfree.nn.hopper.grouped_outer_product`."""
    out_rows, columns = x.shape[1], y.shape[1]
    tiles = tiles.for_columns(out_rows)
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    firsts = begins // ATOM * ATOM
    # An empty group has one step, all of it masked, which leaves zeros.
    steps = jnp.maximum(pl.cdiv(ends - firsts, tiles.depth), 1)
    table = jnp.stack([firsts, begins, ends, steps], axis=1).astype(jnp.int32)
    row_tiles = out_rows // (TILE * tiles.blocks)
    column_tiles = pl.cdiv(columns, tiles.width)
    of_a_group = row_tiles * column_tiles

    def kernel(table: Any, x: Any, y: Any, out: Any) -> None:
        def place(index: Any) -> _Product:
            group = jax.lax.div(index, jnp.int32(of_a_group))
            index = jax.lax.rem(index, jnp.int32(of_a_group))
            row = jax.lax.div(index, jnp.int32(column_tiles)) * tiles.blocks
            column = jax.lax.rem(index, jnp.int32(column_tiles))
            row = row + block_of_cluster(tiles)
            return _Product(group, row, column, *(table[group, i] for i in range(4)))

        def run(ring: Ring, staging: Any) -> None:
            def load(at: _Product, done: Any) -> Any:
                def copies(step: Any, slot: Any, ready: Any) -> None:
                    first = pl.multiple_of(at.first, ATOM)
                    rows = pl.ds(first + step * tiles.depth, tiles.depth)
                    source = y.at[rows, pl.ds(at.column * tiles.width, tiles.width)]
                    copy_to_all(source, ring.b.at[slot], ready, tiles)
                    source = x.at[rows, pl.ds(at.row * TILE, TILE)]
                    plgpu.copy_gmem_to_smem(source, ring.a.at[slot], ready)

                load_steps(ring, done, at.steps, copies)
                return done + at.steps

            def multiply(at: _Product, done: Any) -> Any:
                own = pl.ds(warpgroup() * HALF, HALF)

                def mask(step: Any, slot: Any) -> None:
                    row = at.first + step * tiles.depth

                    @pl.when((row < at.begin) | (row + tiles.depth > at.end))
                    def _() -> None:
                        layout = plgpu.Layout.WGMMA_TRANSPOSED
                        block = ring.a.at[slot, :, own].transpose((1, 0))
                        rows = row + plgpu.broadcasted_iota(
                            jnp.int32, (HALF, tiles.depth), 1, layout=layout
                        )
                        kept = (rows >= at.begin) & (rows < at.end)
                        values = plgpu.load(block, layout=layout)
                        block[...] = jnp.where(kept, values, jnp.zeros_like(values))
                        plgpu.commit_smem()

                def operands(slot: Any) -> tuple[Any, Any]:
                    return ring.a.at[slot, :, own].transpose((1, 0)), ring.b.at[slot]

                acc = multiply_steps(ring, tiles.width, done, at.steps, operands, mask)
                for part, begin in enumerate(range(0, tiles.width, HALF)):
                    slot = staging.at[warpgroup(), part % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    slot[...] = acc[:, begin : begin + HALF].astype(out.dtype)
                    plgpu.commit_smem()
                    rows = pl.ds(at.row * TILE + warpgroup() * HALF, HALF)
                    column = at.column * tiles.width + begin
                    to = out.at[at.group, rows, pl.ds(column, HALF)]
                    plgpu.copy_smem_to_gmem(slot, to)
                return done + at.steps

            run_tiles(ring, place, jnp.int32(num_groups * of_a_group), load, multiply)

        with_ring(
            run, tiles, (tiles.depth, TILE), (tiles.depth, tiles.width), x.dtype, (HALF, HALF)
        )

    shape = jax.ShapeDtypeStruct((num_groups, out_rows, columns), x.dtype)
    out: Array = call(kernel, shape, num_sms, tiles, "grouped_outer_product")(table, x, y)
    return out


class _Place(NamedTuple):
    """A tile of grouped_matmul; ``column`` counts tiles, ``width`` units above the first."""

    group: Any
    begin: Any
    end: Any
    first: Any
    width: Any
    column: Any


class _Product(NamedTuple):
    """A tile of grouped_outer_product; ``row`` and ``column`` count tiles."""

    group: Any
    row: Any
    column: Any
    first: Any
    begin: Any
    end: Any
    steps: Any


def _tiles_of_rows(group_sizes: Array, num_rows: int, tiles: Tiles) -> tuple[Array, Array]:
    """The number of tiles, and of each: the first tile of its group, their number, the group,
    where its rows begin and end, the first row of the tile, and its width, as a number of units
    above the least. The tiles of a group are as few as can be, and differ by one unit at most."""
    unit, num_groups = tiles.unit, group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    firsts = begins // ATOM * ATOM
    units = jnp.where(group_sizes > 0, pl.cdiv(ends - firsts, unit), 0)
    counts = pl.cdiv(units, tiles.width // unit)
    last = jnp.cumsum(counts, dtype=jnp.int32)
    most = pl.cdiv(num_rows + (ATOM - 1) * num_groups, tiles.width) + num_groups
    tile = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(last, tile, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    base, count = (last - counts)[group], jnp.maximum(counts[group], 1)
    each, more = units[group] // count, units[group] % count
    index = tile - base
    first = firsts[group] + (index * each + jnp.minimum(index, more)) * unit
    width = jnp.maximum(each + (index < more) - tiles.least // unit, 0)
    rows = [base, count, group, begins[group], ends[group], first, width]
    return last[-1:], jnp.stack(rows, axis=1).astype(jnp.int32)


def _switch(index: Any, widths: range, body: Callable[[int], None]) -> None:
    jax.lax.switch(index, [functools.partial(body, width) for width in widths])
