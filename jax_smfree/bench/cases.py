# SPDX-License-Identifier: Apache-2.0
"""What is measured: the shapes, their inputs, and the bytes that any implementation must move."""

from __future__ import annotations

import dataclasses
import os

import jax.numpy as jnp
import numpy as np

AXIS = "ep"

# Names of what is timed. A peer's round trip has the peer's name.
LIBRARY, FLOOR, LAUNCH = "jax_smfree", "memory floor", "launch"
COMPUTE, TOGETHER = "compute alone", "compute and jax_smfree"
PHASES = ("dispatch send", "dispatch recv", "combine send", "combine recv")
PEERS = ("all_gather", "all_gather+slots", "all_to_all")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape: R ``ranks``, T ``rows`` per rank, K ``top_k`` of E ``experts``, H ``hidden``."""

    ranks: int
    rows: int
    top_k: int
    experts: int
    hidden: int
    dtype: str
    processes: int = 1

    def __post_init__(self) -> None:
        sizes = (self.ranks, self.rows, self.top_k, self.experts, self.hidden)
        if min(sizes) < 1 or self.top_k > self.experts or self.experts % self.ranks:
            raise ValueError(
                f"Shape: got {self}, expected positive sizes, top_k <= experts, and experts a "
                "multiple of the ranks: each owns the same number."
            )
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self._least_bytes > memory:
            raise ValueError(
                f"Shape: got {self}, which takes more than {self._least_bytes / 2**30:.0f} GiB, "
                f"expected one that fits into the {memory / 2**30:.0f} GiB of this host."
            )

    @property
    def _least_bytes(self) -> int:
        """Memory of the host that the inputs take, and the random numbers they are made of."""
        return self.ranks * self.rows * (8 * self.hidden + 16 * self.experts)

    @property
    def local_experts(self) -> int:
        return self.experts // self.ranks

    @property
    def capacity(self) -> int:
        """Rows of the grouped array, for everybody: what `room` says."""
        return room(self.rows * self.top_k, 1 / self.ranks)

    @property
    def pair_capacity(self) -> int:
        """Rows that the all_to_all way sends per pair: what `room` says, and at most all."""
        there, total, drawn = self.experts - self.local_experts, self.experts, self.top_k
        missed = np.prod([(there - i) / (total - i) for i in range(drawn)])  # no expert on a rank
        return min(self.rows, room((1 - missed) * self.rows, 1 - missed))

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        where = f", {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.ranks} ranks{where}, {self.rows} rows × {self.hidden} {self.dtype}, "
            f"top-{self.top_k} of {self.experts}"
        )


def room(expected: float, chance: float) -> int:
    """For so many events of that chance: 1.25 times, or three standard deviations more if few."""
    deviation = (expected * (1 - chance)) ** 0.5
    return int(np.ceil(max(1.25 * expected, expected + 3 * deviation)))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Global arrays, the ranks one after the other."""

    x: np.ndarray  # [R*T, H]
    topk_idx: np.ndarray  # int32 [R*T, K]
    topk_weights: np.ndarray  # float32 [R*T, K]


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Uniform random routing. Raises if it does not fit: then the seed is at fault."""
    rng = np.random.default_rng(seed)
    total = shape.ranks * shape.rows
    topk_idx = np.argsort(rng.random((total, shape.experts)), axis=1)[:, : shape.top_k]
    x = rng.standard_normal((total, shape.hidden), dtype=np.float32).astype(shape.dtype)
    weights = rng.random((total, shape.top_k), dtype=np.float32)
    inputs = Inputs(x, topk_idx.astype(np.int32), weights)
    per_rank = np.bincount(topk_idx.ravel() // shape.local_experts, minlength=shape.ranks)
    if per_rank.max() > shape.capacity or wire_rows(shape, inputs).max() > shape.pair_capacity:
        raise ValueError(
            f"got a random routing (seed {seed}) that exceeds the capacity of all that is "
            f"compared, 1.25 times balanced routing, for {shape}. Give the ranks more rows."
        )
    return inputs


def wire_rows(shape: Shape, inputs: Inputs) -> np.ndarray:
    """[R, R]: rows that each rank sends to each rank, one per row with an expert there."""
    owner = (inputs.topk_idx // shape.local_experts).reshape(shape.ranks, shape.rows, -1)
    goes = (owner[..., None] == np.arange(shape.ranks)).any(axis=2)
    rows: np.ndarray = goes.sum(axis=1)
    return rows


def phase_bytes(shape: Shape, inputs: Inputs) -> dict[str, int]:
    """Bytes read plus written, over all ranks, by two-phase dispatch and combine at the least.

    Rows only (routing is under 2 %). Each phase reads its rows once and writes its rows once:

    - dispatch send: every row once, packed once for each rank that it concerns;
    - dispatch recv: these, into all N rows of the grouped array;
    - combine send: the results of all copies, one row back for each row that came;
    - combine recv: these, into one row each.
    """
    row = shape.hidden * shape.itemsize
    total = shape.ranks * shape.rows
    sent = int(wire_rows(shape, inputs).sum())
    copies = int((inputs.topk_idx >= 0).sum())
    rows = (total + sent, sent + shape.ranks * shape.capacity, copies + sent, sent + total)
    return {phase: n * row for phase, n in zip(PHASES, rows, strict=True)}
