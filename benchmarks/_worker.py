# SPDX-License-Identifier: Apache-2.0
"""Measures shapes of one number of ranks; ``cpu.py`` starts it, because devices are fixed at start.

usage: _worker.py REQUEST RESULT    two JSON files, {"shapes": [...], "budget_s": seconds} is read
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from _ragged_way import ragged_all_to_all_error
from jax.sharding import Mesh

from jax_smfree.bench import Shape, measure
from jax_smfree.bench.cases import AXIS
from jax_smfree.testing import initialize


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
