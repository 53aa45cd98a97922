# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined,abstract"
"""Grouped matrix multiplications for Hopper GPUs, in Pallas.

    grouped_matmul          out[n] = sum of x[n] @ w[g], over pairs (x, w), for rows n of group g
    grouped_outer_product   out[g] = x[rows of g]^T @ y[rows of g]

Group g has the next group_sizes[g] rows; groups start and end at any row. Neither kernel touches
rows past sum(group_sizes), apart from what is said about ``y`` below, and their time does not
depend on how many there are. `jax_smfree.nn.hopper_ring` says how a block works.

In ``grouped_matmul`` a tile is of the transposed result: the rows of a group are the columns of the
instruction, of which it takes any multiple of 8. So a tile is about as large as what is left of its
group, and not 128 rows. Two blocks of a cluster multiply neighbouring columns with the same rows,
which they load once.

Traits of the hardware that the code below is made of: TMA loads start at rows that are multiples of
8 (a swizzle atom), and what a load finds past the end of an array is zero; TMA stores have a static
number of rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_smfree.nn.hopper_ring import (
    ATOM,
    DEPTH,
    HALF,
    TILE,
    WIDTH,
    Ring,
    block_of_cluster,
    call,
    copy_to_all,
    load_steps,
    multiply_steps,
    run_tiles,
    warpgroup,
    with_ring,
)

# Rows of a tile of grouped_matmul: the least and so many units more. With fewer than the least a
# group takes as long as its weights need to arrive.
LEAST, UNIT = 128, 32
WIDTHS = range(LEAST, WIDTH + 1, UNIT)


def grouped_matmul(
    xs: Sequence[Array],
    ws: Sequence[Array],
    group_sizes: Array,
    *,
    num_sms: int,
    transpose: bool = False,
) -> Array:
    """``xs`` each [N, K], ``ws`` each [G, K, M] (``transpose``: [G, M, K]), int32 [G] -> [N, M].

    16-bit floats, sums in float32, also those over the pairs. K is a multiple of 64 and M of 128.
    Rows of the result past ``sum(group_sizes)`` are whatever the memory held.
    """
    num_rows, contracted = xs[0].shape
    columns = ws[0].shape[1] if transpose else ws[0].shape[2]
    dtype = xs[0].dtype
    blocks = 2 if columns % (2 * TILE) == 0 else 1
    of_a_row = columns // (TILE * blocks)  # tiles, each of all blocks of a cluster
    of_a_pair = contracted // DEPTH  # steps
    steps = len(xs) * of_a_pair
    w_step = (TILE, DEPTH) if transpose else (DEPTH, TILE)

    def kernel(count: Any, table: Any, *arrays: Any) -> None:
        x_refs, w_refs, out = arrays[: len(xs)], arrays[len(xs) : -1], arrays[-1]

        def place(index: Any) -> _Place:
            """Of a group's tiles those of the same columns follow each other."""
            row = jax.lax.div(index, jnp.int32(of_a_row))
            base, number = table[row, 0], table[row, 1]
            index = index - base * of_a_row
            tile = base + jax.lax.rem(index, number)
            column = jax.lax.div(index, number) * blocks + block_of_cluster(blocks)
            group, begin, end, first, width = (table[tile, i] for i in range(2, 7))
            return _Place(group, begin, end, first, width, column)

        def run(ring: Ring, staging: Any) -> None:
            def load(at: _Place, done: Any) -> Any:
                def of_width(width: int) -> None:
                    def copies(x: Any, w: Any, step: Any, slot: Any, ready: Any) -> None:
                        k = pl.ds(step * DEPTH, DEPTH)
                        rows = pl.ds(pl.multiple_of(at.first, ATOM), width)
                        copy_to_all(ring, x.at[rows, k], ring.b.at[slot, pl.ds(0, width)], ready)
                        m = pl.ds(at.column * TILE, TILE)
                        source = w.at[at.group, m, k] if transpose else w.at[at.group, k, m]
                        plgpu.copy_gmem_to_smem(source, ring.a.at[slot], ready)

                    for pair, (x, w) in enumerate(zip(x_refs, w_refs, strict=True)):
                        before = done + pair * of_a_pair
                        load_steps(ring, before, of_a_pair, functools.partial(copies, x, w))

                _switch(at.width, of_width)
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
                    plgpu.wait_smem_to_gmem(1 + width // UNIT, wait_read_only=True)

                _switch(at.width, of_width)
                return done + steps

            run_tiles(ring, place, count[0] * of_a_row, load, multiply)

        with_ring(run, w_step, (WIDTH, DEPTH), dtype, blocks)

    table = _tiles_of_rows(group_sizes, num_rows)
    shape = jax.ShapeDtypeStruct((num_rows, columns), dtype)
    name = "grouped_matmul_transposed" if transpose else "grouped_matmul"
    out: Array = call(kernel, shape, num_sms, blocks, name)(*table, *xs, *ws)
    return out


def grouped_outer_product(x: Array, y: Array, group_sizes: Array, *, num_sms: int) -> Array:
    """``x`` [N, K], ``y`` [N, M], int32 [G] -> [G, K, M]; zero for an empty group.

    16-bit floats, sums in float32. K is a multiple of 128 and M of 64. The last step of a group
    reads up to ``DEPTH`` rows after it, whose ``x`` is masked and whose ``y`` must be finite.
    """
    out_rows, columns = x.shape[1], y.shape[1]
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    firsts = begins // ATOM * ATOM
    # An empty group has one step, all of it masked, which leaves zeros.
    steps = jnp.maximum(pl.cdiv(ends - firsts, DEPTH), 1)
    table = jnp.stack([firsts, begins, ends, steps], axis=1).astype(jnp.int32)
    column_tiles = pl.cdiv(columns, WIDTH)
    of_a_group = (out_rows // TILE) * column_tiles

    def kernel(table: Any, x: Any, y: Any, out: Any) -> None:
        def place(index: Any) -> _Product:
            group = jax.lax.div(index, jnp.int32(of_a_group))
            index = jax.lax.rem(index, jnp.int32(of_a_group))
            row = jax.lax.div(index, jnp.int32(column_tiles))
            column = jax.lax.rem(index, jnp.int32(column_tiles))
            return _Product(group, row, column, *(table[group, i] for i in range(4)))

        def run(ring: Ring, staging: Any) -> None:
            def load(at: _Product, done: Any) -> Any:
                def copies(step: Any, slot: Any, ready: Any) -> None:
                    rows = pl.ds(pl.multiple_of(at.first, ATOM) + step * DEPTH, DEPTH)
                    source = y.at[rows, pl.ds(at.column * WIDTH, WIDTH)]
                    plgpu.copy_gmem_to_smem(source, ring.b.at[slot], ready)
                    source = x.at[rows, pl.ds(at.row * TILE, TILE)]
                    plgpu.copy_gmem_to_smem(source, ring.a.at[slot], ready)

                load_steps(ring, done, at.steps, copies)
                return done + at.steps

            def multiply(at: _Product, done: Any) -> Any:
                own = pl.ds(warpgroup() * HALF, HALF)

                def mask(step: Any, slot: Any) -> None:
                    row = at.first + step * DEPTH

                    @pl.when((row < at.begin) | (row + DEPTH > at.end))
                    def _() -> None:
                        # Masked in Layout.WGMMA_TRANSPOSED, products were wrong on an H200.
                        block = ring.a.at[slot, :, own]
                        rows = row + plgpu.broadcasted_iota(
                            jnp.int32, (DEPTH, HALF), 0, layout=plgpu.Layout.WGMMA
                        )
                        kept = (rows >= at.begin) & (rows < at.end)
                        values = plgpu.layout_cast(block[...], plgpu.Layout.WGMMA)
                        block[...] = jnp.where(kept, values, jnp.zeros_like(values))
                        plgpu.commit_smem()

                def operands(slot: Any) -> tuple[Any, Any]:
                    return ring.a.at[slot, :, own].transpose((1, 0)), ring.b.at[slot]

                acc = multiply_steps(ring, WIDTH, done, at.steps, operands, mask)
                for part, begin in enumerate(range(0, WIDTH, HALF)):
                    slot = staging.at[warpgroup(), part % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    slot[...] = acc[:, begin : begin + HALF].astype(out.dtype)
                    plgpu.commit_smem()
                    rows = pl.ds(at.row * TILE + warpgroup() * HALF, HALF)
                    to = out.at[at.group, rows, pl.ds(at.column * WIDTH + begin, HALF)]
                    plgpu.copy_smem_to_gmem(slot, to)
                return done + at.steps

            run_tiles(ring, place, jnp.int32(num_groups * of_a_group), load, multiply)

        with_ring(run, (DEPTH, TILE), (DEPTH, WIDTH), x.dtype, blocks=1)

    shape = jax.ShapeDtypeStruct((num_groups, out_rows, columns), x.dtype)
    out: Array = call(kernel, shape, num_sms, 1, "grouped_outer_product")(table, x, y)
    return out


class _Place(NamedTuple):
    """A tile of grouped_matmul; ``column`` counts tiles, ``width`` units above the least."""

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


def _tiles_of_rows(group_sizes: Array, num_rows: int) -> tuple[Array, Array]:
    """The number of tiles, and of each: the first tile of its group, their number, the group,
    where its rows begin and end, the first row of the tile, and its width, as a number of units
    above the least. The tiles of a group are as few as can be, and differ by one unit at most."""
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    firsts = begins // ATOM * ATOM
    units = jnp.where(group_sizes > 0, pl.cdiv(ends - firsts, UNIT), 0)
    counts = pl.cdiv(units, WIDTH // UNIT)
    last = jnp.cumsum(counts, dtype=jnp.int32)
    most = pl.cdiv(num_rows + (ATOM - 1) * num_groups, WIDTH) + num_groups
    tile = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(last, tile, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    base, count = (last - counts)[group], jnp.maximum(counts[group], 1)
    each, more = units[group] // count, units[group] % count
    index = tile - base
    first = firsts[group] + (index * each + jnp.minimum(index, more)) * UNIT
    width = jnp.maximum(each + (index < more) - LEAST // UNIT, 0)
    rows = [base, count, group, begins[group], ends[group], first, width]
    return last[-1:], jnp.stack(rows, axis=1).astype(jnp.int32)


def _switch(width: Any, body: Callable[[int], None]) -> None:
    jax.lax.switch(width, [functools.partial(body, each) for each in WIDTHS])


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
