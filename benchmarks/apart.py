# SPDX-License-Identifier: Apache-2.0
"""Measurements in new processes: alone, or variants of one by turns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.results import Json
from jax_smfree.testing import initialize, launch
from jax_smfree.testing.environment import detect
from jax_smfree.testing.launch import LaunchResult


@dataclasses.dataclass(frozen=True)
class Variant:
    """A measurement, and the processes that make it together.

    Attributes:
      name: of the variant in results and tables.
      measure: ``measure(path, settings)``, a function of a module's top level; it calls `join`
        first, and process 0 writes JSON to ``path``.
      settings: literals.
    """

    name: str
    measure: Callable[[str, Json], None]
    settings: Json
    processes: int = 1
    devices_per_process: int = 1
    platform: str = "cuda"
    timeout_s: float = 300.0


def join() -> None:
    """Connects this process with the others of its variant, if there are any."""
    place = detect()
    if place and place.num_processes > 1:
        initialize()


def run(variant: Variant) -> tuple[Json | None, LaunchResult]:
    """What process 0 has written, complete or not, and what became of the processes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "result.json")
        done = launch(
            variant.measure,
            args=[str(path), variant.settings],
            processes=variant.processes,
            devices_per_process=variant.devices_per_process,
            platform=variant.platform,
            timeout_s=variant.timeout_s,
            log_dir=scratch,
            follow=sys.stdout,
        )
        if not done.ok:
            print(done.summary(), flush=True)
        result = None
        with contextlib.suppress(OSError, json.JSONDecodeError):  # none, or half of one
            result = results.load(path)
    return result, done


def by_turns(
    variants: Sequence[Variant], rounds: int, result: Json, path_of: Callable[[Json], Path]
) -> Path:
    """Runs all variants in every round: what disturbs the machine for a while disturbs them all.

    ``result[name]`` becomes the list of a variant's runs, and ``result["failed"]`` what failed. It
    is on disk after every run, at ``path_of(machine)``, which is returned.
    """
    result |= {variant.name: [] for variant in variants} | {"failed": []}
    path = None
    for variant in [*variants] * rounds:
        found, done = run(variant)
        print(f"{variant.name}: {done.elapsed_s:.0f} s", flush=True)
        if found is not None:
            result[variant.name].append(found)
            path = path or path_of(found["machine"])
        if not done.ok:
            why = "timed out" if done.timed_out else f"rank {done.first_failed} failed first"
            result["failed"].append(f"{variant.name}: {why} ({done.elapsed_s:.0f} s)")
        if path:
            results.write(path, result)
    if path is None:
        raise RuntimeError(f"no run has left a result: {result['failed']}")
    return path
