# SPDX-License-Identifier: Apache-2.0
"""Which ranks form a node, and whether rows cross between nodes directly or hierarchically."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

from jax_smfree._src.config import EpConfig


def resolve(where: str, config: EpConfig, nodes_of_ranks: Sequence[Sequence[Hashable]]) -> EpConfig:
    """``config`` with ``ranks_per_node`` and ``mode`` filled in where they are None.

    ``nodes_of_ranks``: by replica, where the hardware has each of its ranks. The rule
    stands in the docstring of `EpConfig`. ``where`` begins the text of an error.

    Raises:
      ValueError: for nodes that are not equally large and contiguous, and for a hierarchical mode
        where there is nothing to tell apart.
    """
    num_ranks = len(nodes_of_ranks[0])
    per_node = config.ranks_per_node
    if per_node is None:
        sizes = {_ranks_per_node(nodes) for nodes in nodes_of_ranks}
        if len(sizes) == 1 and None not in sizes:
            (per_node,) = sizes
        elif config.mode == "direct":
            per_node = 1
        else:
            raise ValueError(
                f"{where}: got ranks in the nodes (CPU: processes, GPU: hosts) "
                f"{[list(nodes) for nodes in nodes_of_ranks]}, expected nodes of one size whose "
                "ranks follow one another. Order the devices of the mesh by node (along several "
                "axes the last one runs fastest), or set EpConfig.ranks_per_node, or "
                "EpConfig(mode='direct')."
            )
    assert per_node is not None
    if num_ranks % per_node:
        raise ValueError(
            f"{where}: got ranks_per_node={per_node} for {num_ranks} ranks, expected a divisor of "
            f"{num_ranks}: nodes are equally large."
        )
    several = 1 < per_node < num_ranks
    if config.mode == "hierarchical" and not several:
        raise ValueError(
            f"{where}: got mode='hierarchical' for {num_ranks} ranks in nodes of {per_node}, "
            "expected more than one node and more than one rank in each. Set "
            "EpConfig.ranks_per_node, or leave the mode to the library (None)."
        )
    mode = config.mode or ("hierarchical" if several else "direct")
    return dataclasses.replace(config, ranks_per_node=per_node, mode=mode)


def _ranks_per_node(node_of_rank: Sequence[Hashable]) -> int | None:
    """The size of the nodes; None if they are not of one size, or not contiguous."""
    size = list(node_of_rank).count(node_of_rank[0])
    nodes = list(dict.fromkeys(node_of_rank))
    return size if list(node_of_rank) == [node for node in nodes for _ in range(size)] else None
