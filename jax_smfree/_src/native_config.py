# SPDX-License-Identifier: Apache-2.0
"""`EpConfig` as the native module takes it, for groups and for size hints alike."""

from jax_smfree import _native
from jax_smfree._src.config import EpConfig

# The default of EpConfig.sm_push_bytes: see docs/performance.md.
SM_PUSH_BYTES = 2 << 20


def native_config(config: EpConfig, num_ranks: int) -> _native.GroupConfig:
    """``config`` with its nodes and mode resolved (`nodes.resolve`), for ``num_ranks`` ranks."""
    fields = {
        **vars(config),
        "num_ranks": num_ranks,
        "hierarchical": config.mode == "hierarchical",
        "dtype": config.dtype.name,
        "recv_capacity": config.recv_capacity or 0,
        "drop_overflow": config.overflow == "drop",
        "sm_push_bytes": SM_PUSH_BYTES if config.sm_push_bytes is None else config.sm_push_bytes,
        "puts_on_device": config.puts == "device",
    }
    native = _native.GroupConfig()
    for name in set(fields) - {"mode", "overflow", "puts"}:
        setattr(native, name, fields[name])
    return native
