# SPDX-License-Identifier: Apache-2.0
"""Where rows go: uniform random routing, or a sample of what a real router chose."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

Shares = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts that a row visits. All ranks are taken to send rows of the same kind.

    Attributes:
      num_experts: E, split into equal blocks over the ranks.
      top_k: K experts per row.
      sample: int [rows, K] expert ids, -1 for none, as ``topk_idx`` of ``dispatch_send``; ``None``
        is K of E at random, without repetition.

    Raises:
      ValueError: for a sample of another shape, or with ids that there are not.

    Example:
      >>> Routing(num_experts=4, top_k=2).row_shares(2).round(2)  # 1 - (2 of 4) / (2 of 2)
      array([0.83, 0.83])
      >>> Routing(4, 1, sample=np.array([[0], [1], [3], [0]])).row_shares(2)
      array([0.75, 0.25])
    """

    num_experts: int
    top_k: int
    sample: NDArray[np.integer] | None = None

    def __post_init__(self) -> None:
        if self.sample is None:
            return
        ids = np.asarray(self.sample)
        if ids.ndim != 2 or ids.shape[1] != self.top_k or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"Routing: got a sample {ids.dtype} {list(ids.shape)}, expected integers "
                f"[rows, {self.top_k}]: the expert ids of each row."
            )
        if ids.size == 0 or ids.min() < -1 or ids.max() >= self.num_experts:
            raise ValueError(
                f"Routing: got a sample of {ids.size} ids"
                + (f" from {ids.min()} to {ids.max()}" if ids.size else "")
                + f", expected some, from -1 (none) to {self.num_experts - 1}."
            )

    def row_shares(self, owners: int) -> Shares:
        """[owners] the share of rows that visit each of ``owners`` equal blocks of experts."""
        if self.sample is None:
            there = self.num_experts - self.num_experts // owners
            missed = math.comb(there, self.top_k) / math.comb(self.num_experts, self.top_k)
            return np.full(owners, 1 - missed)
        visited = np.sort(self._owners(owners), axis=1)
        first = np.diff(visited, axis=1, prepend=-1) > 0  # a row counts once; -1 counts never
        return np.bincount(visited[first], minlength=owners) / len(visited)

    def copy_shares(self, owners: int) -> Shares:
        """[owners] copies per row, one for each expert that it visits there."""
        if self.sample is None:
            return np.full(owners, self.top_k / owners)
        ids = self._owners(owners)
        return np.bincount(ids[ids >= 0], minlength=owners) / len(ids)

    def _owners(self, owners: int) -> NDArray[np.integer]:
        ids = np.asarray(self.sample)
        return np.where(ids >= 0, ids // (self.num_experts // owners), -1)
