# SPDX-License-Identifier: Apache-2.0
"""The bytes between nodes that follow from the routing, to compare what the library counts with."""

from __future__ import annotations

import numpy as np

from benchmarks.gpu.cases import Case
from benchmarks.results import Json

DIRECT, HIERARCHICAL = MODES = "direct", "hierarchical"
ALIGNMENT = 128  # of each part of a message, csrc/protocol/layout.h
BETWEEN_NODES = {  # what the library counts them as, by operation
    "dispatch": "dispatch_internode_bytes",
    "combine": "combine_internode_bytes",
}


def _crossing_rows(case: Case, per_node: int, mode: str) -> np.ndarray:
    """Rows of each message that leaves a node: [R, ranks or nodes], zero where none does."""
    shape = case.shape
    place_size = per_node if mode == HIERARCHICAL else 1  # ranks that a message is for
    places = np.arange(shape.ranks // place_size)
    place = case.experts // (shape.local_experts * place_size)
    place = place.reshape(shape.ranks, shape.rows, -1)
    rows = (place[..., None] == places).any(axis=2).sum(axis=1)
    leaves = places * place_size // per_node != np.arange(shape.ranks)[:, None] // per_node
    return np.where(leaves, rows, 0)


def expected(case: Case, per_node: int, mode: str) -> Json:
    """Of one dispatch and one combine, by the name of their counter, and the rows that cross."""
    rows = _crossing_rows(case, per_node, mode)

    def aligned(row_bytes: int) -> int:
        return int((-(-rows * row_bytes // ALIGNMENT) * ALIGNMENT).sum())

    moved = aligned(case.shape.row_bytes)
    beside = 2 * aligned(4 * case.shape.top_k)  # int32 expert ids, float32 weights
    return {
        BETWEEN_NODES["dispatch"]: moved + beside,
        BETWEEN_NODES["combine"]: moved,
        "rows": int(rows.sum()),
    }
