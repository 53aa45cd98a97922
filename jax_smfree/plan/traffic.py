# SPDX-License-Identifier: Apache-2.0
"""The rows that a dispatch moves over each kind of link; a combine moves as many back."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_smfree.plan.routing import Routing


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Rows of one dispatch, of the rank that has most of them.

    Attributes:
      network: to or from ranks of other nodes, whichever is more.
      nvlink: to or from ranks of the own node, whichever is more.
      sent: rows packed by a send, its own included.
      received: rows unpacked by a recv, its own included.
      forwarded: rows that a recv hands on inside the node (hierarchical).
      copies: rows after the dispatch, one for each expert visited.
    """

    network: float
    nvlink: float
    sent: float
    received: float
    forwarded: float
    copies: float


def direct(routing: Routing, rows: int, ranks: int, ranks_per_node: int) -> Traffic:
    """Every rank sends a row to each rank that has an expert for it."""
    share = routing.row_shares(ranks)
    of_node = share.reshape(-1, ranks_per_node).sum(axis=1).repeat(ranks_per_node)
    return Traffic(
        network=_busiest(rows * (share.sum() - of_node), rows * (ranks - ranks_per_node) * share),
        nvlink=_busiest(rows * (of_node - share), rows * (ranks_per_node - 1) * share),
        sent=rows * float(share.sum()),
        received=rows * ranks * float(share.max()),
        forwarded=0.0,
        copies=_copies(routing, rows, ranks),
    )


def hierarchical(routing: Routing, rows: int, ranks: int, ranks_per_node: int) -> Traffic:
    """A row crosses the network once per node, to the rank of the same index, which forwards it."""
    nodes = ranks // ranks_per_node
    share, of_node = routing.row_shares(ranks), routing.row_shares(nodes)
    arriving = rows * ranks * share  # at each rank, from all ranks
    elsewhere = arriving * (ranks_per_node - 1) / ranks_per_node  # by way of another rank
    leaving = elsewhere.reshape(nodes, ranks_per_node).mean(axis=1)  # of each rank of a node
    return Traffic(
        network=_busiest(rows * (of_node.sum() - of_node), rows * (nodes - 1) * of_node),
        nvlink=_busiest(leaving, elsewhere),
        sent=rows * float(of_node.sum()),
        received=rows * nodes * float(of_node.max()),
        forwarded=float(arriving.max()),
        copies=_copies(routing, rows, ranks),
    )


def _busiest(out: np.ndarray, into: np.ndarray) -> float:
    return float(max(out.max(), into.max()))


def _copies(routing: Routing, rows: int, ranks: int) -> float:
    return rows * ranks * float(routing.copy_shares(ranks).max())
