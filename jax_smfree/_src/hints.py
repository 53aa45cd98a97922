# SPDX-License-Identifier: Apache-2.0
"""How many bytes a GPU group takes, from the code that lays the buffers out."""

from jax_smfree import _native
from jax_smfree._src import arguments, nodes
from jax_smfree._src.config import EpConfig
from jax_smfree._src.native_config import native_config

# Of one rank: an exbibyte. Beyond it the arithmetic of the layout would overflow.
_MOST_BYTES = 2**60


def rdma_size_hint(config: EpConfig, num_ranks: int) -> int:
    """Bytes per rank of the buffers that other nodes reach over the network.

    A node has ``config.ranks_per_node`` ranks (``None``: all of them); with a single node the
    answer is zero. The sets that count are those of a group over several processes:
    ``config.num_sets``, or its default.

    In direct mode these are all buffers: what `nvl_size_hint` says of one node, and ``16 *
    ranks**2`` bytes of announcements for each set. In hierarchical mode each set has two areas for
    the most rows that a rank sends (``max_tokens * min(top_k, nodes)``) or takes as a relay
    (``max_tokens * nodes``, or ``wire_capacity + max_tokens`` if that is less), and small buffers.

    Raises:
      ValueError, TypeError: for experts that do not divide over the ranks, or ranks that do not
        over the nodes; for what is no config or no number of ranks.

    Example:
      >>> smfree.rdma_size_hint(config, num_ranks=4)  # one node
      0
      >>> two_nodes = dataclasses.replace(config, ranks_per_node=2)
      >>> smfree.rdma_size_hint(two_nodes, num_ranks=4) > 0
      True
    """
    return _native.rdma_size_hint(_resolved("rdma_size_hint", config, num_ranks))


def nvl_size_hint(config: EpConfig, num_ranks: int) -> int:
    """Bytes per rank of the buffers that ranks of the same node reach over NVLink.

    The sets that count are those of a group over several processes: ``config.num_sets``, or its
    default. A group in one process starts with fewer, and gets those that its programs take, mostly
    one or two.

    In direct mode with all ranks in one node each set has two areas for the most rows that a rank
    sends (``max_tokens * min(top_k, ranks)``) or keeps (``wire_capacity``), and small buffers. In
    direct mode over several nodes the answer is zero: `rdma_size_hint` counts all buffers. In
    hierarchical mode each set has two areas of ``wire_capacity`` rows. A GPU gives whole pages of
    2 MiB.

    Raises:
      ValueError, TypeError: as `rdma_size_hint`.

    Example:
      >>> large = smfree.EpConfig(num_experts=64, top_k=8, hidden=7168, max_tokens=8192,
      ...                         recv_capacity=81920, num_sets=1)
      >>> [round(smfree.nvl_size_hint(large, ranks) / 2**30, 1) for ranks in (8, 16, 32, 64)]
      [1.8, 2.3, 2.3, 2.3]
    """
    return _native.nvl_size_hint(_resolved("nvl_size_hint", config, num_ranks))


def buffer_bytes(config: EpConfig, num_ranks: int) -> int:
    """Bytes per rank of all buffers."""
    native = _resolved("buffer_bytes", config, num_ranks)
    return _native.nvl_size_hint(native) + _native.rdma_size_hint(native)


def _resolved(where: str, config: EpConfig, num_ranks: int) -> _native.GroupConfig:
    arguments.instance(where, "config", config, EpConfig)
    num_ranks = arguments.integer(where, "num_ranks", num_ranks, most=arguments.MOST_RANKS)
    if config.num_experts % num_ranks:
        raise ValueError(
            f"{where}: got num_experts={config.num_experts} and num_ranks={num_ranks}, expected "
            "num_experts a multiple of num_ranks: each rank owns the same number."
        )
    slots = config.top_k * 8 + config.hidden * config.dtype.itemsize
    regions = num_ranks * max(config.num_lanes, config.num_sets or 0)
    if regions * (config.max_tokens * slots + config.num_experts * 4) > _MOST_BYTES // 64:
        raise ValueError(
            f"{where}: got {config} for {num_ranks} ranks, expected buffers of less than an "
            "exbibyte. Lower max_tokens, hidden, num_lanes or num_sets."
        )
    return native_config(nodes.resolve(where, config, [[0] * num_ranks]), num_ranks)
