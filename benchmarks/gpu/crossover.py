# SPDX-License-Identifier: Apache-2.0
"""Up to which size of a message the pack kernel had better store to the peers itself.

The default of ``EpConfig.sm_push_bytes`` comes from here.
"""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import Mesh

from benchmarks.gpu.cases import Scale, make_case
from benchmarks.gpu.library import Library
from benchmarks.gpu.timing import prepare, summary
from benchmarks.gpu.trace import KERNELS
from benchmarks.results import Json

ROWS = (32, 64, 128, 256, 512, 1024, 2048)
SHAPE = "7168:8of256"


def measure(into: Json, mesh: Mesh, scale: Scale, ways: Mapping[str, Json]) -> None:
    """A native dispatch in device time, from the send's first block to the recv's last.

    Nothing on CPUs, which have one way only.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return
    into["shape"], into["dispatch"] = SHAPE, []
    for rows in ROWS:
        case = make_case(mesh, f"{rows}x{SHAPE}")
        entry: Json = {"rows": rows, "message_bytes": case.message_bytes}
        for name, options in ways.items():
            with Library(case, scale, **options) as library:
                run = prepare(mesh, {"": (library.dispatch, *case.inputs)})[""]
                times = [r.between_us(*KERNELS[:2], outer=True) for r in library.record(run)]
            entry[name] = summary(times)
        into["dispatch"].append(entry)
