# SPDX-License-Identifier: Apache-2.0
"""The ceilings of the links between the GPUs, and of their memory: ``cuda/link_ceilings.cu``."""

from __future__ import annotations

from benchmarks import cuda
from benchmarks.gpu.cases import Case
from benchmarks.results import Json

LARGE_BYTES = 256 * 2**20  # what leaves a GPU where only the rate of the link counts


def measure(into: Json, cases: list[Case]) -> None:
    """At the message size of every case, and a large one."""
    ranks = cases[0].shape.ranks
    sizes = {case.shape.name: case.message_bytes for case in cases} if ranks > 1 else {}
    large = LARGE_BYTES // max(1, ranks - 1)
    found = cuda.run("link_ceilings", ranks, large, *sizes.values())
    into["local_copy_gb_s"] = found["local_copy"]
    if found["messages"]:
        into["large"], *messages = found["messages"]
        into["by_shape"] = dict(zip(sizes, messages, strict=True))


def egress_gb_s(ceilings: Json, shape_name: str) -> float | None:
    """What all-to-all copies by copy engine reach at a shape's messages, if it was measured."""
    found = ceilings.get("by_shape", {}).get(shape_name)
    return float(found["all_to_all"]) if found else None
