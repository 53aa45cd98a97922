# SPDX-License-Identifier: Apache-2.0
"""Dispatch, combine and their gradients once more, in NumPy, for all ranks at once.

Written with loops over single copies and float64 sums, so that it can be checked by reading. It
shares no code with the library or with ``reference.py``. Arrays have a leading rank axis:
``x`` [R, T, H], ``topk_idx`` [R, T, K], ``topk_weights`` [R, T, K]; received ones [R, N, ...].
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where every copy (source rank, position, slot) of one dispatch goes."""

    rows: Ints  # [R receivers, R sources, T, K], -1: not on that receiver
    group_sizes: Ints  # [R, E / R]
    num_dropped: Ints  # [R]
    num_rows: int  # N

    @property
    def copies(self) -> Ints:
        """[C, 5]: receiver, source, position, slot, row; of each copy that arrives."""
        where = np.argwhere(self.rows >= 0)
        return np.concatenate([where, self.rows[tuple(where.T)][:, None]], axis=1)


def worst_case_rows(
    num_ranks: int, num_experts: int, rows_sent: int, top_k: int, alignment: int = 1
) -> int:
    local = num_experts // num_ranks
    copies = num_ranks * rows_sent * min(top_k, local)
    rows = copies + (alignment - 1) * min(local, copies)
    return -(-rows // alignment) * alignment


def route(
    topk_idx: ArrayLike,
    num_experts: int,
    *,
    recv_capacity: int | None = None,
    alignment: int = 1,
) -> Routing:
    idx = np.asarray(topk_idx)
    num_ranks, rows_sent, top_k = idx.shape
    local = num_experts // num_ranks
    num_rows = recv_capacity or worst_case_rows(num_ranks, num_experts, rows_sent, top_k, alignment)

    copies_of_expert: list[list[tuple[int, int, int]]] = [[] for _ in range(num_experts)]
    for source in range(num_ranks):
        for position in range(rows_sent):
            for slot in range(top_k):
                expert = idx[source, position, slot]
                if 0 <= expert < num_experts:
                    copies_of_expert[expert].append((source, position, slot))

    rows = np.full((num_ranks, *idx.shape), -1, np.int32)
    group_sizes = np.zeros((num_ranks, local), np.int32)
    num_dropped = np.zeros(num_ranks, np.int32)
    for receiver in range(num_ranks):
        start = 0
        for e in range(local):
            copies = copies_of_expert[receiver * local + e]
            for row, copy in enumerate(copies, start=start):
                if row < num_rows:
                    rows[receiver][copy] = row
                else:
                    num_dropped[receiver] += 1
            end = min(start + -(-len(copies) // alignment) * alignment, num_rows)
            group_sizes[receiver, e] = end - start
            start = end
    return Routing(rows, group_sizes, num_dropped, num_rows)


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


def _float64(values: ArrayLike) -> Floats:
    return np.asarray(values).astype(np.float64)
