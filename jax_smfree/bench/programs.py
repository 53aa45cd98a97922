# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of one shape: the library's, the peers', and the memory floor."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree.bench.cases import AXIS, FLOOR, LAUNCH, LIBRARY, PHASES, Inputs, Shape
from jax_smfree.bench.jax_ways import WAYS, Way

Program = Callable[..., Any]
Sample = dict[str, tuple[float, float]]  # by name: seconds, and seconds of all cores together


class Turn(Protocol):
    """Something that is timed in its turn."""

    def measure(self, sample: Sample, *inputs: Array) -> None: ...


def sharded(mesh: Mesh) -> NamedSharding:
    """The ranks one after the other along the first dimension."""
    return NamedSharding(mesh, P(AXIS))


def compiled(f: Callable[..., Any], mesh: Mesh) -> Program:
    """How every program is made: manual over the mesh, all arrays sharded over the ranks."""
    return jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    )


def timed(sample: Sample, name: str, program: Program, *args: Any) -> Any:
    """Runs a program and blocks on all that it returns."""
    start, start_cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(program(*args))
    sample[name] = (time.perf_counter() - start, time.process_time() - start_cpu)
    return result


def on_mesh(mesh: Mesh, inputs: Inputs) -> tuple[Array, ...]:
    def put(value: np.ndarray) -> Array:
        return jax.make_array_from_callback(value.shape, sharded(mesh), lambda index: value[index])

    return put(inputs.x), put(inputs.topk_idx), put(inputs.topk_weights)


class Library:
    """Native mode in one program; and the four phases, each a program of its own.

    Between the phases everything crosses the jit boundary, and each phase starts when all ranks
    have ended the one before. So a phase's time is its work and the launch of a program (see
    `Launch`), and recv phases never wait. The sum over the phases is more than the round trip.
    """

    def __init__(self, mesh: Mesh, shape: Shape) -> None:
        config = smfree.EpConfig(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            max_tokens=shape.rows,
            dtype=jnp.dtype(shape.dtype),
            recv_capacity=shape.capacity,
            mode="direct",  # processes of one host are no nodes of a network
        )
        self.group = smfree.EpGroup.create(mesh, axis=AXIS, config=config)
        self._round_trip = compiled(self._exchange, mesh)
        self._phases = [
            compiled(f, mesh)
            for f in (
                smfree.dispatch_send,
                smfree.dispatch_recv,
                smfree.combine_send,
                smfree.combine_recv,
            )
        ]
        self._token = jax.block_until_ready(self.group.token())

    def _exchange(self, x: Array, topk_idx: Array, topk_weights: Array) -> Array:
        d, token = smfree.dispatch(self.group.token(), x, topk_idx, topk_weights)
        out: Array = smfree.combine(token, d, lax.optimization_barrier(d.x))[0]
        return out

    def results(self, *inputs: Array) -> tuple[Array, Array, Array]:
        """Grouped rows, sizes of the groups, and the round trip's result."""
        send, recv, _, _ = self._phases
        d, token = recv(send(self._token, *inputs))
        del token  # the dispatch was received: nothing is in flight
        return d.x, d.group_sizes, self._round_trip(*inputs)

    def measure(self, sample: Sample, *inputs: Array) -> None:
        timed(sample, LIBRARY, self._round_trip, *inputs)
        dispatch_send, dispatch_recv, combine_send, combine_recv = self._phases
        token = timed(sample, PHASES[0], dispatch_send, self._token, *inputs)
        d, token = timed(sample, PHASES[1], dispatch_recv, token)
        token = timed(sample, PHASES[2], combine_send, token, d, d.x)
        timed(sample, PHASES[3], combine_recv, token)
        self.group.check()


class Peer:
    """A JAX way: its round trip in one program."""

    def __init__(self, mesh: Mesh, shape: Shape, name: str, way: Way) -> None:
        self._name, self._shape, self._way = name, shape, way
        self._dispatch = compiled(functools.partial(way.dispatch, shape), mesh)
        self._round_trip = compiled(self._exchange, mesh)

    def _exchange(self, x: Array, topk_idx: Array, topk_weights: Array) -> Array:
        d = self._way.dispatch(self._shape, x, topk_idx, topk_weights)
        # Stands for the experts: without it XLA would never make the grouped rows.
        return self._way.combine(self._shape, d, lax.optimization_barrier(d.x))

    def results(self, *inputs: Array) -> tuple[Array, Array, Array]:
        d = self._dispatch(*inputs)
        return d.x, d.group_sizes, self._round_trip(*inputs)

    def measure(self, sample: Sample, *inputs: Array) -> None:
        timed(sample, self._name, self._round_trip, *inputs)


class Launch:
    """A program that does next to nothing on every rank: what starting one costs."""

    def __init__(self, mesh: Mesh) -> None:
        self._program = compiled(lambda x: x + 1, mesh)
        self._operand = self._program(jnp.zeros(mesh.size, device=sharded(mesh)))

    def measure(self, sample: Sample, *_: Array) -> None:
        timed(sample, LAUNCH, self._program, self._operand)


class Floor:
    """Copies as many bytes as the four phases must move: one memcpy per core and phase.

    Its time is the ceiling that this machine's memory (or its caches, for small shapes) sets, with
    pages that are there already.
    """

    def __init__(self, phase_bytes: dict[str, int], processes: int) -> None:
        cores = len(os.sched_getaffinity(0))
        self._threads = max(1, cores // processes)
        self._sizes = [b // (2 * processes * self._threads) for b in phase_bytes.values()]
        shape = (self._threads, max(self._sizes))
        self._source, self._target = np.ones(shape, np.uint8), np.zeros(shape, np.uint8)
        self._pool = ThreadPoolExecutor(self._threads)

    def _copy(self, thread: int) -> None:
        for size in self._sizes:
            np.copyto(self._target[thread, :size], self._source[thread, :size])

    def _copy_all(self) -> None:
        list(self._pool.map(self._copy, range(self._threads)))

    def measure(self, sample: Sample, *_: Array) -> None:
        timed(sample, FLOOR, self._copy_all)

    def close(self) -> None:
        self._pool.shutdown()


def peers(mesh: Mesh, shape: Shape) -> dict[str, Peer]:
    return {name: Peer(mesh, shape, name, way) for name, way in WAYS.items()}
