# SPDX-License-Identifier: Apache-2.0
"""The machinery of `matmul_rings`: one ring of steps, which is all that a block does.

Its memory warpgroup loads the operands of each step, and two others multiply them, 64 rows of a
tile each. A warpgroup that stores a tile holds up neither the loads of the next one nor, for as
many steps as the ring has, the other warpgroup.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_smfree.nn.hopper import ATOM, MEMORY_REGISTERS, WARPGROUPS

HALF = 64  # rows of a tile that one warpgroup multiplies
TILE = WARPGROUPS * HALF
REGISTERS = 232  # of a thread that multiplies


class Tiles(NamedTuple):
    """Tiles of ``TILE`` x at most ``width``, multiplied in steps of ``depth``."""

    width: int = 256
    # The widths of tiles of grouped_matmul are the least and so many units more. With fewer rows
    # than the least one a group takes as long as its weights need to arrive.
    least: int = 128
    unit: int = 32
    depth: int = 64
    stages: int = 4  # steps whose operands are in shared memory at a time
    blocks: int = 2  # of a cluster, of neighbouring columns
    in_flight: int = 1  # steps that may still multiply when the next one starts

    @property
    def columns(self) -> int:
        """Of a swizzle atom, of 16 bits each."""
        return min(self.depth, 64)

    def for_columns(self, count: int) -> "Tiles":
        """With no cluster if it would multiply past the last column."""
        return self if count % (TILE * self.blocks) == 0 else self._replace(blocks=1)


class Ring(NamedTuple):
    a: Any  # [stages, ...]: of each step what this block alone multiplies,
    b: Any  # and what all blocks of its cluster do
    ready: Any
    free: Any
    tiles: Tiles

    def slot(self, step: Any) -> Any:
        return jax.lax.rem(step, jnp.int32(self.tiles.stages))


def warpgroup() -> Any:
    return jax.lax.axis_index("warpgroup")


def block_of_cluster(tiles: Tiles) -> Any:
    return jax.lax.axis_index("block") if tiles.blocks > 1 else 0


def copy_to_all(source: Any, to: Any, ready: Any, tiles: Tiles) -> None:
    axes = "block" if tiles.blocks > 1 else None
    plgpu.copy_gmem_to_smem(source, to, ready, collective_axes=axes)


def load_steps(ring: Ring, done: Any, steps: Any, copies: Any) -> None:
    @pl.loop(0, steps)
    def _(step: Any) -> None:
        slot = ring.slot(done + step)

        @pl.when(done + step >= ring.tiles.stages)
        def _() -> None:
            plgpu.barrier_wait(ring.free.at[slot])

        copies(step, slot, ring.ready.at[slot])


def multiply_steps(
    ring: Ring, width: int, done: Any, steps: Any, operands: Any, prepare: Any = None
) -> Any:
    in_flight = ring.tiles.in_flight

    @functools.partial(pl.run_scoped, acc=plgpu.ACC((HALF, width), jnp.float32))
    def result(acc: Any) -> Any:
        @pl.loop(0, steps)
        def _(step: Any) -> None:
            slot = ring.slot(done + step)
            plgpu.barrier_wait(ring.ready.at[slot])
            if prepare is not None:
                prepare(step, slot)
            plgpu.wgmma(acc, *operands(slot))
            plgpu.wgmma_wait(in_flight)

            @pl.when(step >= in_flight)
            def _() -> None:
                plgpu.barrier_arrive(ring.free.at[ring.slot(done + step - in_flight)])

        if in_flight:
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(ring.free.at[ring.slot(done + steps - 1)])
        return acc[...]

    return result


def run_tiles(ring: Ring, place: Any, count: Any, load: Any, multiply: Any) -> None:
    """The tiles of this block, in every warpgroup. The place of the next tile is read before the
    work on one, so that nothing waits for it."""
    sm, sms = jax.lax.axis_index("sm"), jax.lax.axis_size("sm")
    number = jax.lax.div(count - sm + sms - 1, jnp.int32(sms))

    def tiles(body: Any) -> Any:
        def one(index: Any, carry: Any) -> Any:
            at, done = carry
            following = place(jnp.minimum(sm + (index + 1) * sms, jnp.maximum(count - 1, 0)))
            return following, body(at, done)

        start = place(jnp.minimum(sm, jnp.maximum(count - 1, 0)))
        return jax.lax.fori_loop(0, number, one, (start, jnp.int32(0)))[1]

    def memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        done = tiles(load)

        # A block stays until nothing arrives at its barriers any more.
        @pl.loop(jnp.maximum(done - ring.tiles.stages, 0), done)
        def _(step: Any) -> None:
            plgpu.barrier_wait(ring.free.at[ring.slot(step)])

    def compute() -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        tiles(multiply)
        plgpu.wait_smem_to_gmem(0)

    jax.lax.cond(warpgroup() == WARPGROUPS, memory, compute)


def with_ring(run: Any, tiles: Tiles, a: Any, b: Any, dtype: Any, staging: Any) -> None:
    swizzle = plgpu.SwizzleTransform(2 * tiles.columns)
    tiling = plgpu.TilingTransform((ATOM, tiles.columns))

    def smem(*shape: int, transforms: Any = (tiling, swizzle)) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    barriers = dict(num_arrivals=WARPGROUPS, num_barriers=tiles.stages)
    free = (
        plgpu.ClusterBarrier(collective_axes=("block",), **barriers)
        if tiles.blocks > 1
        else plgpu.Barrier(**barriers)
    )

    @functools.partial(
        pl.run_scoped,
        a=smem(tiles.stages, *a),
        b=smem(tiles.stages, *b),
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        free=free,
        staging=smem(WARPGROUPS, 2, *staging, transforms=(plgpu.SwizzleTransform(128),)),
        collective_axes="warpgroup",
    )
    def _(a: Any, b: Any, ready: Any, free: Any, staging: Any) -> None:
        run(Ring(a, b, ready, free, tiles), staging)


def call(kernel: Any, out: Any, num_sms: int, tiles: Tiles, name: str) -> Any:
    cluster = (
        dict(cluster=(tiles.blocks,), cluster_names=("block",)) if tiles.blocks > 1 else dict()
    )
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(num_sms // tiles.blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **cluster,
    )
