# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined,abstract"
"""The machinery of `jax_smfree.nn.hopper`: one ring of steps, which is all that a block does.

A block goes through its tiles of the output, and through each in steps of ``DEPTH`` along what is
contracted. Its memory warpgroup loads the operands of each step by TMA, and two others multiply
them, ``HALF`` rows of a tile each. The ring goes on from tile to tile: while a warpgroup stores a
tile, the first steps of the next one arrive, and the other warpgroup may be as many steps ahead or
behind as the ring has.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ATOM = 8  # rows of a swizzle atom
DEPTH = 64  # of a step: what a swizzle atom holds of a row, 128 bytes
STAGES = 4  # steps whose operands are in shared memory at a time
WIDTH = 256  # of a tile at most
WARPGROUPS = 2  # that multiply
HALF = 64  # rows of a tile that one of them multiplies
TILE = WARPGROUPS * HALF
MEMORY_REGISTERS = 40  # of a thread that only issues loads
REGISTERS = 232  # of a thread that multiplies


class Ring(NamedTuple):
    a: Any  # [STAGES, ...]: of each step what this block alone multiplies,
    b: Any  # and what all blocks of its cluster do
    ready: Any
    free: Any
    blocks: int  # of a cluster


def slot_of(step: Any) -> Any:
    return jax.lax.rem(step, jnp.int32(STAGES))


def warpgroup() -> Any:
    return jax.lax.axis_index("warpgroup")


def block_of_cluster(blocks: int) -> Any:
    return jax.lax.axis_index("block") if blocks > 1 else 0


def copy_to_all(ring: Ring, source: Any, to: Any, ready: Any) -> None:
    """To the blocks of the cluster, each of which asks for its part of it."""
    axes = "block" if ring.blocks > 1 else None
    plgpu.copy_gmem_to_smem(source, to, ready, collective_axes=axes)


def load_steps(ring: Ring, done: Any, steps: Any, copies: Callable[..., None]) -> None:
    """``copies(step, slot, ready)`` for each of the ``steps`` of a tile, of ``done`` before it."""

    @pl.loop(0, steps)
    def _(step: Any) -> None:
        slot = slot_of(done + step)

        @pl.when(done + step >= STAGES)
        def _() -> None:
            plgpu.barrier_wait(ring.free.at[slot])

        copies(step, slot, ring.ready.at[slot])


def multiply_steps(
    ring: Ring,
    width: int,
    done: Any,
    steps: Any,
    operands: Callable[[Any], tuple[Any, Any]],
    prepare: Callable[[Any, Any], None] | None = None,
) -> Any:
    """The sum of the products of ``operands(slot)``, float32 [HALF, width]. While one step is
    multiplied, the next one is waited for and prepared."""

    @functools.partial(pl.run_scoped, acc=plgpu.ACC((HALF, width), jnp.float32))
    def result(acc: Any) -> Any:
        @pl.loop(0, steps)
        def _(step: Any) -> None:
            slot = slot_of(done + step)
            plgpu.barrier_wait(ring.ready.at[slot])
            if prepare is not None:
                prepare(step, slot)
            plgpu.wgmma(acc, *operands(slot))
            plgpu.wgmma_wait(1)

            @pl.when(step >= 1)
            def _() -> None:
                plgpu.barrier_arrive(ring.free.at[slot_of(done + step - 1)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(ring.free.at[slot_of(done + steps - 1)])
        return acc[...]

    return result


def run_tiles(
    ring: Ring, place: Callable[[Any], Any], count: Any, load: Any, multiply: Any
) -> None:
    """The tiles of this block, of ``count`` of all blocks.

    The memory warpgroup calls ``load(at, done)`` and the others ``multiply(at, done)``, with
    ``at = place(index)`` of a tile and the steps ``done`` before it; both return the steps that are
    done then. The place of the next tile is read before the work on one, so that nothing waits for
    it.
    """
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
        @pl.loop(jnp.maximum(done - STAGES, 0), done)
        def _(step: Any) -> None:
            plgpu.barrier_wait(ring.free.at[slot_of(step)])

    def compute() -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        tiles(multiply)
        plgpu.wait_smem_to_gmem(0)

    jax.lax.cond(warpgroup() == WARPGROUPS, memory, compute)


def with_ring(
    run: Callable[[Ring, Any], None],
    a: tuple[int, int],
    b: tuple[int, int],
    dtype: Any,
    blocks: int,
) -> None:
    """``run(ring, staging)`` for steps of ``a`` and ``b``; ``staging`` [WARPGROUPS, 2, HALF, HALF]
    is where results wait for their stores."""
    swizzle = plgpu.SwizzleTransform(128)
    tiled = (plgpu.TilingTransform((ATOM, DEPTH)), swizzle)
    barriers: dict[str, Any] = dict(num_arrivals=WARPGROUPS, num_barriers=STAGES)
    free = (
        plgpu.ClusterBarrier(collective_axes=("block",), **barriers)
        if blocks > 1
        else plgpu.Barrier(**barriers)
    )

    @functools.partial(
        pl.run_scoped,
        a=plgpu.SMEM((STAGES, *a), dtype, transforms=tiled),
        b=plgpu.SMEM((STAGES, *b), dtype, transforms=tiled),
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        free=free,
        staging=plgpu.SMEM((WARPGROUPS, 2, HALF, HALF), dtype, transforms=(swizzle,)),
        collective_axes="warpgroup",
    )
    def _(a: Any, b: Any, ready: Any, free: Any, staging: Any) -> None:
        run(Ring(a, b, ready, free, blocks), staging)


def call(kernel: Any, out: jax.ShapeDtypeStruct, num_sms: int, blocks: int, name: str) -> Any:
    """The kernel with a block for each SM, ``blocks`` of them a cluster."""
    cluster: dict[str, Any] = (
        dict(cluster=(blocks,), cluster_names=("block",)) if blocks > 1 else dict()
    )
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(num_sms // blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **cluster,
    )
