# SPDX-License-Identifier: Apache-2.0
"""Measures shapes of one number of ranks; ``cpu.py`` starts it, because devices are fixed at start.

usage: _worker.py REQUEST RESULT    two JSON files, {"shapes": [...], "budget_s": seconds} is read
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _cases import AXIS, LIBRARY, Inputs, Shape, make_inputs, phase_bytes
from _programs import Floor, Launch, Library, Sample, on_mesh, peers
from _ragged_way import ragged_all_to_all_error
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_smfree.testing import initialize

MIN_ROUNDS, MAX_ROUNDS = 5, 40


def local(array: Array) -> list[np.ndarray]:
    """What this process's ranks hold, by rank."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [np.asarray(shard.data) for shard in shards]


def check(shape: Shape, inputs: Inputs, sides: dict[str, Any], arrays: tuple[Array, ...]) -> None:
    """All sides must give the same grouped rows, bit by bit, and the right sums."""
    expected_rows: list[np.ndarray] | None = None
    total = inputs.x.astype(np.float64) * inputs.topk_weights.sum(1, keepdims=True, dtype=float)
    tolerance = 1e-5 if shape.dtype == "float32" else 3e-2
    for name, side in sides.items():
        x, group_sizes, out = side.results(*arrays)
        sizes = [int(s.sum()) for s in local(group_sizes)]
        rows = [r[:n] for r, n in zip(local(x), sizes, strict=True)]
        if expected_rows is None:
            expected_rows = rows
        for mine, theirs in zip(rows, expected_rows, strict=True):
            np.testing.assert_array_equal(mine, theirs, f"grouped rows of {name}, {shape}")
        for shard in out.addressable_shards:
            want = total[shard.index]
            error = np.abs(np.asarray(shard.data, np.float64) - want).max()
            if not error <= tolerance * np.abs(want).max():
                raise AssertionError(f"{name}, {shape}: the sums are off by {error}")


def measure(shape: Shape, mesh: Mesh, budget_s: float) -> dict[str, Any]:
    """Samples of every program, taken in turn: whatever disturbs the machine disturbs them all.

    In its turn each runs twice, and the second time counts, as in a training loop. The first time
    it pays for what the one before left: cold caches, and memory that went back to the host of a
    virtual machine in the meantime. Every round starts with another one.
    """
    inputs = make_inputs(shape)
    arrays = on_mesh(mesh, inputs)
    moved = phase_bytes(shape, inputs)
    library, others, floor = Library(mesh, shape), peers(mesh, shape), Floor(moved, shape.processes)
    turns = [library, *others.values(), Launch(mesh), floor]

    def one_round(number: int) -> Sample:
        sample: Sample = {}
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            turn.measure(sample, *arrays)
            turn.measure(sample, *arrays)
        return sample

    with library.group:
        check(shape, inputs, {LIBRARY: library, **others}, arrays)
        start = time.perf_counter()
        one_round(0)
        rounds = np.clip(budget_s / (time.perf_counter() - start), MIN_ROUNDS, MAX_ROUNDS)
        rounds = int(multihost_utils.broadcast_one_to_all(rounds.astype(np.int32)))
        samples = [one_round(number) for number in range(rounds)]
    floor.close()
    return {
        **dataclasses.asdict(shape),
        "capacity": shape.capacity,
        "bytes": moved,
        "rounds": rounds,
        "times_us": {name: summary([s[name] for s in samples]) for name in sorted(samples[0])},
    }


def summary(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Microseconds: percentiles of the time, and the median of what all cores spent on it."""
    time_us, cpu_us = np.array(samples).T * 1e6
    p10, median, p90 = np.percentile(time_us, [10, 50, 90])
    names = {"median": median, "p10": p10, "p90": p90, "min": time_us.min()}
    names["cpu"] = float(np.median(cpu_us))
    return {name: round(float(value), 1) for name, value in names.items()}


def main(request: Path, result: Path) -> None:
    initialize()
    task = json.loads(request.read_text())
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    cases = []
    for fields in task["shapes"]:
        shape = Shape(**fields)
        start = time.perf_counter()
        cases.append(measure(shape, mesh, task["budget_s"]))
        print(f"  {shape}: {cases[-1]['rounds']} rounds, {time.perf_counter() - start:.1f} s")
        sys.stdout.flush()
    ragged = ragged_all_to_all_error(mesh)
    if jax.process_index() == 0:
        result.write_text(json.dumps({"cases": cases, "ragged_all_to_all": ragged}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
