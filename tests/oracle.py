# SPDX-License-Identifier: Apache-2.0
"""Dispatch, combine and their gradients once more, in NumPy, for all ranks at once.

Written with loops over single copies and float64 sums, so that it can be checked by reading. It
shares no code with the library or with ``reference.py``. Arrays have a leading rank axis:
``x`` [R, T, H], ``topk_idx`` [R, T, K], ``topk_weights`` [R, T, K]; received ones [R, N, ...].
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where every copy (source rank, position, slot) of one dispatch goes."""

    rows: Ints  # [R receivers, R sources, T, K], -1: not on that receiver
    came: NDArray[np.bool_]  # [R receivers, R sources, T], rows that were sent there
    recv_counts: Ints  # [R receivers, R sources], rows that the wire takes
    group_sizes: Ints  # [R, E / R]
    row_counts: Ints  # [R, E / R], the same without padding
    num_dropped: Ints  # [R]
    num_rows: int  # N
    in_groups: NDArray[np.bool_]  # [R, N], rows of d.x that are said to be something

    @property
    def copies(self) -> Ints:
        """[C, 5]: receiver, source, position, slot, row; of each copy that arrives."""
        where = np.argwhere(self.rows >= 0)
        return np.concatenate([where, self.rows[tuple(where.T)][:, None]], axis=1)

    @property
    def lost(self) -> NDArray[np.bool_]:
        """[R, T]: rows that lost all their copies on a rank that they were sent to."""
        lost: NDArray[np.bool_] = (self.came & (self.rows < 0).all(axis=-1)).any(axis=0)
        return lost


def worst_case_rows(
    num_ranks: int, num_experts: int, rows_sent: int, top_k: int, alignment: int, layout: str
) -> int:
    local = num_experts // num_ranks
    if layout == "padded":
        return local * (-(-num_ranks * rows_sent // alignment) * alignment)
    copies = num_ranks * rows_sent * min(top_k, local)
    rows = copies + (alignment - 1) * min(local, copies)
    return -(-rows // alignment) * alignment


def route(
    topk_idx: ArrayLike,
    num_experts: int,
    *,
    recv_capacity: int | None = None,
    wire_capacity: int | None = None,
    alignment: int = 1,
    capacity: ArrayLike | None = None,
    layout: str = "grouped",
    ranks_per_node: int = 1,
) -> Routing:
    """``capacity`` [R]: how many rows of ``d.x`` each rank fills at most.

    In the padded layout it is of each local expert; the rows are numbered as in the grouped one.
    ``ranks_per_node``: in hierarchical mode, else 1.
    """
    idx = np.asarray(topk_idx)
    num_ranks, rows_sent, top_k = idx.shape
    local = num_experts // num_ranks
    worst = worst_case_rows(num_ranks, num_experts, rows_sent, top_k, alignment, layout)
    num_rows = recv_capacity or worst
    most = num_rows // local if layout == "padded" else num_rows
    wire_rows = wire_capacity or recv_capacity or num_ranks * rows_sent

    to_fill = np.full(num_ranks, most) if capacity is None else np.asarray(capacity)
    to_fill = np.clip(to_fill // alignment * alignment, 0, most)

    in_groups = np.full((num_ranks, num_rows), layout == "grouped")
    rows = np.full((num_ranks, *idx.shape), -1, np.int32)
    came = np.zeros((num_ranks, num_ranks, rows_sent), bool)
    row_counts = np.zeros((num_ranks, local), np.int32)
    group_sizes = np.zeros((num_ranks, local), np.int32)
    recv_counts = np.zeros((num_ranks, num_ranks), np.int32)
    num_dropped = np.zeros(num_ranks, np.int32)
    handed_on: dict[tuple[int, int], int] = {}  # by index and node: rows that a relay has handed on
    withheld: set[tuple[int, int, int]] = set()  # and those that it does not: source, row, receiver
    for source in range(num_ranks if ranks_per_node > 1 else 0):
        for receiver in range(num_ranks):
            relay = source % ranks_per_node, receiver // ranks_per_node
            for position in range(rows_sent):
                if receiver not in idx[source, position][idx[source, position] >= 0] // local:
                    continue
                handed_on[relay] = handed_on.get(relay, 0) + 1
                if handed_on[relay] > wire_rows:
                    withheld.add((source, position, receiver))

    for receiver in range(num_ranks):
        copies_of_expert: list[list[tuple[int, int, int]]] = [[] for _ in range(local)]
        for source in range(num_ranks):
            for position in range(rows_sent):
                experts = idx[source, position] - receiver * local
                slots_here = np.flatnonzero((experts >= 0) & (experts < local))
                if len(slots_here) == 0:
                    continue
                came[receiver, source, position] = True
                is_withheld = (source, position, receiver) in withheld
                if is_withheld or recv_counts[receiver].sum() == wire_rows:
                    num_dropped[receiver] += len(slots_here)
                    continue
                recv_counts[receiver, source] += 1
                for slot in slots_here:
                    copies_of_expert[experts[slot]].append((source, position, slot))
        start, limit = 0, to_fill[receiver]
        for e, copies in enumerate(copies_of_expert):
            if layout == "padded":
                start = e * most
                limit = start + to_fill[receiver]
            for row, copy in enumerate(copies, start=start):
                if row < limit:
                    rows[receiver][copy] = row
                    row_counts[receiver, e] += 1
                else:
                    num_dropped[receiver] += 1
            end = min(start + -(-len(copies) // alignment) * alignment, limit)
            group_sizes[receiver, e] = end - start
            in_groups[receiver, start:end] = True
            start = end
    return Routing(
        rows, came, recv_counts, group_sizes, row_counts, num_dropped, num_rows, in_groups
    )


def dispatch(routing: Routing, x: ArrayLike, topk_weights: ArrayLike) -> tuple[Floats, Floats]:
    """Received rows [R, N, H] and weights [R, N]."""
    x, topk_weights = _float64(x), _float64(topk_weights)
    num_ranks = x.shape[0]
    received = np.zeros((num_ranks, routing.num_rows, x.shape[-1]))
    weights = np.zeros((num_ranks, routing.num_rows))
    for receiver, source, position, slot, row in routing.copies:
        received[receiver, row] = x[source, position]
        weights[receiver, row] = topk_weights[source, position, slot]
    return received, weights


def combine(routing: Routing, y: ArrayLike, weights: ArrayLike) -> Floats:
    """[R, T, H]: the sum over a row's copies of weight times result."""
    y, weights = _float64(y), _float64(weights)
    num_ranks, _, rows_sent, _ = routing.rows.shape
    out = np.zeros((num_ranks, rows_sent, y.shape[-1]))
    for receiver, source, position, _, row in routing.copies:
        out[source, position] += weights[receiver, row] * y[receiver, row]
    return out


def dispatch_grad(
    routing: Routing, received_ct: ArrayLike, weights_ct: ArrayLike
) -> tuple[Floats, Floats]:
    """Cotangents of ``x`` [R, T, H] and ``topk_weights`` [R, T, K]."""
    received_ct, weights_ct = _float64(received_ct), _float64(weights_ct)
    num_ranks, _, rows_sent, top_k = routing.rows.shape
    x_ct = np.zeros((num_ranks, rows_sent, received_ct.shape[-1]))
    topk_weights_ct = np.zeros((num_ranks, rows_sent, top_k))
    for receiver, source, position, slot, row in routing.copies:
        x_ct[source, position] += received_ct[receiver, row]
        topk_weights_ct[source, position, slot] = weights_ct[receiver, row]
    return x_ct, topk_weights_ct


def combine_grad(
    routing: Routing, y: ArrayLike, weights: ArrayLike, out_ct: ArrayLike
) -> tuple[Floats, Floats]:
    """Cotangents of ``y`` [R, N, H] and ``weights`` [R, N]."""
    y, weights, out_ct = _float64(y), _float64(weights), _float64(out_ct)
    y_ct, weights_ct = np.zeros_like(y), np.zeros_like(weights)
    for receiver, source, position, _, row in routing.copies:
        y_ct[receiver, row] = weights[receiver, row] * out_ct[source, position]
        weights_ct[receiver, row] = y[receiver, row] @ out_ct[source, position]
    return y_ct, weights_ct


def quantise(
    rows: ArrayLike, block: int, dtype: Any, power_of_two: bool = False
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Values in ``dtype`` and a scale for each block of the last axis, in float32 throughout."""
    rows = np.asarray(rows, np.float32)
    most = np.float32(ml_dtypes.finfo(dtype).max)
    blocks = rows.reshape(*rows.shape[:-1], -1, block)
    magnitude = np.maximum(np.abs(blocks).max(axis=-1), np.float32(1e-30))
    scales = magnitude * (np.float32(1) / most)
    if power_of_two:
        scales = np.exp2(np.ceil(np.log2(scales, dtype=np.float64))).astype(np.float32)
    scales[~np.isfinite(magnitude)] = np.nan
    with np.errstate(invalid="ignore"):
        values = blocks * (np.float32(1) / scales)[..., None]
    return values.astype(dtype).reshape(rows.shape), scales


def dequantise(values: NDArray[Any], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows again, in float32."""
    blocks = values.astype(np.float32).reshape(*scales.shape, -1)
    rows: NDArray[np.float32] = blocks * scales[..., None]
    return rows.reshape(values.shape)


def _float64(values: ArrayLike) -> Floats:
    return np.asarray(values).astype(np.float64)
