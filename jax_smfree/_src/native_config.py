# SPDX-License-Identifier: Apache-2.0
"""`EpConfig` as the native module takes it, for groups and for size hints alike."""

from jax_smfree import _native
from jax_smfree._src.config import EpConfig

# The default of EpConfig.sm_push_bytes: as far as storing was found to take less time on the SMs
# than leaving rows to the copy engine (docs/performance.md), and so much for all ranks together
# that these buffers do not grow with them.
_MOST_BYTES = 8 << 20
_ALL_RANKS_BYTES = 16 << 20


def sm_push_bytes(num_ranks: int) -> int:
    return min(_MOST_BYTES, _ALL_RANKS_BYTES // num_ranks)


def native_config(config: EpConfig, num_ranks: int) -> _native.GroupConfig:
    """``config`` with its nodes and mode resolved (`nodes.resolve`), for ``num_ranks`` ranks."""
    fields = {
        **vars(config),
        "num_ranks": num_ranks,
        "hierarchical": config.mode == "hierarchical",
        "row_bytes": config.hidden * config.dtype.itemsize,
        "recv_capacity": config.recv_capacity or 0,
        "num_sets": config.num_sets or 0,
        "wire_capacity": config.wire_capacity or 0,
        "padded_groups": config.layout == "padded",
        "drop_overflow": config.overflow == "drop",
        "sm_push_bytes": sm_push_bytes(num_ranks)
        if config.sm_push_bytes is None
        else config.sm_push_bytes,
        "puts_on_device": config.puts == "device",
    }
    native = _native.GroupConfig()
    python_only = {"hidden", "dtype", "wire", "grad_wire", "layout", "mode", "overflow", "puts"}
    for name in set(fields) - python_only:
        setattr(native, name, fields[name])
    return native
