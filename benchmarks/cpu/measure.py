# SPDX-License-Identifier: Apache-2.0
"""Shapes of one number of ranks, in processes of their own, because devices are fixed at start."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import apart, results
from benchmarks.ragged_way import ragged_all_to_all_error
from benchmarks.results import Json
from jax_smfree import bench
from jax_smfree.bench.cases import AXIS


def measure(path: str, settings: Json) -> None:
    """All of ``settings["shapes"]``, each with ``settings["budget_s"]`` seconds of samples."""
    apart.join()
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    cases = []
    for fields in settings["shapes"]:
        shape = bench.Shape(**fields)
        start = time.perf_counter()
        cases.append(bench.measure(shape, mesh, settings["budget_s"]))
        took_s = time.perf_counter() - start
        print(f"  {shape}: {cases[-1]['rounds']} rounds, {took_s:.1f} s", flush=True)
    ragged = ragged_all_to_all_error(mesh)
    if jax.process_index() == 0:
        results.write(Path(path), {"cases": cases, "ragged_all_to_all": ragged})
