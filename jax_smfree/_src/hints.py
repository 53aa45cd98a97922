# SPDX-License-Identifier: Apache-2.0
"""How many bytes a GPU group takes, from the code that lays the buffers out."""

from jax_smfree import _native
from jax_smfree._src import nodes
from jax_smfree._src.config import EpConfig
from jax_smfree._src.native_config import native_config


def rdma_size_hint(config: EpConfig, num_ranks: int) -> int:
    """Bytes per rank of the buffers that other nodes reach over the network.

    With ``config.ranks_per_node`` ranks in a node (``None``: all in one). In every lane, direction
    of differentiation and parity these are ``max_tokens * hidden * itemsize * nodes * 2`` and
    headers; in direct mode ``ranks`` in the place of ``nodes``; zero for a single node.

    Raises:
      ValueError: for experts that do not divide over the ranks, or ranks that do not over the
        nodes.
    """
    return _native.rdma_size_hint(_resolved(config, num_ranks))


def nvl_size_hint(config: EpConfig, num_ranks: int) -> int:
    """Bytes per rank of the buffers that ranks of the same node reach over NVLink.

    See `rdma_size_hint`. A GPU gives whole pages of 2 MiB.
    """
    return _native.nvl_size_hint(_resolved(config, num_ranks))


def buffer_bytes(config: EpConfig, num_ranks: int) -> int:
    """Bytes per rank of all buffers."""
    native = _resolved(config, num_ranks)
    return _native.nvl_size_hint(native) + _native.rdma_size_hint(native)


def _resolved(config: EpConfig, num_ranks: int) -> _native.GroupConfig:
    if config.num_experts % num_ranks:
        raise ValueError(
            f"size hint: got num_experts={config.num_experts} and num_ranks={num_ranks}, expected "
            "num_experts a multiple of num_ranks: each rank owns the same number."
        )
    config = nodes.resolve("size hint", config, [[0] * num_ranks])
    return native_config(config, num_ranks)
