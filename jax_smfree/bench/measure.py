# SPDX-License-Identifier: Apache-2.0
"""Times every program of a shape in turn, after checking that all of them compute the same."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_smfree.bench.cases import LIBRARY, Inputs, Shape, make_inputs, phase_bytes
from jax_smfree.bench.overlapped import Overlapped
from jax_smfree.bench.programs import Floor, Launch, Library, Sample, Turn, on_mesh, peers

MIN_ROUNDS, MAX_ROUNDS = 5, 40


def _local(array: Array) -> list[np.ndarray]:
    """What this process's ranks hold, by rank."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [np.asarray(shard.data) for shard in shards]


def _check(shape: Shape, inputs: Inputs, sides: dict[str, Any], arrays: tuple[Array, ...]) -> None:
    """All sides must give the same grouped rows, bit by bit, and the right sums."""
    expected_rows: list[np.ndarray] | None = None
    total = inputs.x.astype(np.float64) * inputs.topk_weights.sum(1, keepdims=True, dtype=float)
    tolerance = 1e-5 if shape.dtype == "float32" else 3e-2
    for name, side in sides.items():
        x, group_sizes, out = side.results(*arrays)
        sizes = [int(s.sum()) for s in _local(group_sizes)]
        rows = [r[:n] for r, n in zip(_local(x), sizes, strict=True)]
        if expected_rows is None:
            expected_rows = rows
        for mine, theirs in zip(rows, expected_rows, strict=True):
            np.testing.assert_array_equal(mine, theirs, f"grouped rows of {name}, {shape}")
        for shard in out.addressable_shards:
            want = total[shard.index]
            error = np.abs(np.asarray(shard.data, np.float64) - want).max()
            if not error <= tolerance * np.abs(want).max():
                raise AssertionError(f"{name}, {shape}: the sums are off by {error}")


def measure(
    shape: Shape,
    mesh: Mesh,
    budget_s: float,
    *,
    overlap: bool = False,
    on_round: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Samples of every program, taken in turn: whatever disturbs the machine disturbs them all.

    In its turn each runs twice, and the second time counts, as in a training loop. The first time
    it pays for what the one before left: cold caches, and memory that went back to the host of a
    virtual machine in the meantime. Every round starts with another one.

    Args:
      shape: what is measured.
      mesh: ``shape.ranks`` devices along the axis ``cases.AXIS``; collective over its processes.
      budget_s: seconds that the samples may take, beside compilation; at least 5 rounds are made.
      overlap: also a round trip around matrix products, and the products alone.
      on_round: told how many rounds are done, and of how many.

    Returns:
      A JSON value: the shape, its bytes, and for each program ``times_us``: percentiles of the
      time, and the median of what all cores spent on it.

    Raises:
      AssertionError: when a result is wrong.
      ValueError: when the random routing does not fit into the shape's capacities.
    """
    inputs = make_inputs(shape)
    arrays = on_mesh(mesh, inputs)
    moved = phase_bytes(shape, inputs)
    library, others = Library(mesh, shape), peers(mesh, shape)
    turns: list[Turn] = [library, *others.values(), Launch(mesh)]

    def one_round(number: int) -> Sample:
        sample: Sample = {}
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            turn.measure(sample, *arrays)
            turn.measure(sample, *arrays)
        return sample

    with library.group, contextlib.ExitStack() as stack:
        _check(shape, inputs, {LIBRARY: library, **others}, arrays)
        if mesh.devices.flat[0].platform == "cpu":  # the memory that it copies in is the host's
            turns.append(stack.enter_context(contextlib.closing(Floor(moved, shape.processes))))
        if overlap:
            round_trip_s, _ = one_round(0)[LIBRARY]
            turns.append(Overlapped(mesh, shape, library.group, round_trip_s))
        start = time.perf_counter()
        one_round(0)
        rounds = _agreed(budget_s / (time.perf_counter() - start))
        samples = []
        for number in range(rounds):
            samples.append(one_round(number))
            on_round(number + 1, rounds)
    return {
        **dataclasses.asdict(shape),
        "capacity": shape.capacity,
        "bytes": moved,
        "rounds": rounds,
        "times_us": {name: _summary([s[name] for s in samples]) for name in sorted(samples[0])},
    }


def _agreed(rounds: float) -> int:
    """The same number in all processes."""
    wanted = np.array(np.clip(rounds, MIN_ROUNDS, MAX_ROUNDS), np.int32)
    return int(multihost_utils.broadcast_one_to_all(wanted))


def _summary(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Microseconds: percentiles of the time, and the median of what all cores spent on it."""
    time_us, cpu_us = np.array(samples).T * 1e6
    p10, median, p90 = np.percentile(time_us, [10, 50, 90])
    names = {"median": median, "p10": p10, "p90": p90, "min": time_us.min()}
    names["cpu"] = float(np.median(cpu_us))
    return {name: round(float(value), 1) for name, value in names.items()}
