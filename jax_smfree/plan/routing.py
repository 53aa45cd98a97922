# SPDX-License-Identifier: Apache-2.0
"""Where rows go: uniform random routing, or a sample of what a real router chose."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from jax_smfree._src import arguments

# So many that no model has them, and so few that tables of them fit into memory.
_MOST_EXPERTS = 2**20

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
      ValueError, TypeError: for sizes that are no positive integers, ``top_k`` above
        ``num_experts``, a sample of another shape, or with ids that there are not.

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
        for name in ("num_experts", "top_k"):
            value = arguments.integer("Routing", name, getattr(self, name), most=_MOST_EXPERTS)
            object.__setattr__(self, name, value)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"Routing: got top_k={self.top_k} of num_experts={self.num_experts}, expected "
                "top_k <= num_experts: a row goes to an expert at most once."
            )
        if self.sample is None:
            return
        try:
            ids = np.asarray(self.sample)
        except (TypeError, ValueError) as error:  # rows of several lengths, keys of JAX
            raise ValueError(
                f"Routing: got {arguments.shown(self.sample)} as the sample, expected an array of "
                f"integers [rows, {self.top_k}]."
            ) from error
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
        """[owners] the share of rows that visit each of ``owners`` equal blocks of experts.

        Raises:
          ValueError, TypeError: for ``owners`` that ``num_experts`` is no multiple of.
        """
        block = self._block(owners)
        if self.sample is None:
            # As comb(E - block, K) / comb(E, K), one expert chosen after the other.
            left = self.num_experts - np.arange(self.top_k)
            missed = np.prod(np.maximum(left - block, 0) / left)
            return np.full(owners, 1 - missed)
        visited = np.sort(self._owners(owners), axis=1)
        first = np.diff(visited, axis=1, prepend=-1) > 0  # a row counts once; -1 counts never
        return np.bincount(visited[first], minlength=owners) / len(visited)

    def copy_shares(self, owners: int) -> Shares:
        """[owners] copies per row, one for each expert that it visits there.

        Raises:
          ValueError, TypeError: as `row_shares`.
        """
        self._block(owners)
        if self.sample is None:
            return np.full(owners, self.top_k / owners)
        ids = self._owners(owners)
        return np.bincount(ids[ids >= 0], minlength=owners) / len(ids)

    def _owners(self, owners: int) -> NDArray[np.integer]:
        ids = np.asarray(self.sample)
        return np.where(ids >= 0, ids // self._block(owners), -1)

    def _block(self, owners: int) -> int:
        """The experts of each owner."""
        owners = arguments.integer("Routing", "owners", owners, most=self.num_experts)
        if self.num_experts % owners:
            raise ValueError(
                f"Routing: got owners={owners} of num_experts={self.num_experts}, expected a "
                "divisor: the blocks are equally large."
            )
        return self.num_experts // owners
