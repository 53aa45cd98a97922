# SPDX-License-Identifier: Apache-2.0
"""The extension module, see ffi/module.cc."""

from typing import Any

class GroupConfig:
    def __init__(
        self,
        *,
        num_ranks: int,
        ranks_per_node: int,
        hierarchical: bool,
        num_experts: int,
        top_k: int,
        hidden: int,
        max_tokens: int,
        dtype: str,
        recv_capacity: int,
        expert_alignment: int,
        num_lanes: int,
        drop_overflow: bool,
        differentiable: bool,
        timeout_s: float,
    ) -> None: ...

class CpuGroup:
    def __init__(
        self,
        *,
        group_id: int,
        replica: int,
        config: GroupConfig,
        process_of_rank: list[int],
        process: int,
        secret: str,
    ) -> None: ...
    def address(self) -> str: ...
    def connect(self, addresses: list[str]) -> None: ...
    def close(self) -> None: ...
    def check(self) -> str | None: ...
    def stats(self) -> dict[str, int]: ...
    def memory_report(self) -> dict[str, int]: ...
    def set_chaos(
        self,
        *,
        seed: int,
        max_delay_us: int,
        reorder: bool,
        stall_probability: float,
        stall_ms: int,
    ) -> None: ...

class CudaGroup:
    """Only where `has_cuda`."""

    def __init__(
        self, *, group_id: int, config: GroupConfig, devices: list[int], sm_push_bytes: int
    ) -> None: ...
    @staticmethod
    def among_processes(
        *,
        group_id: int,
        config: GroupConfig,
        rank: int,
        device: int,
        process_of_rank: list[int],
        memory: NvshmemMemory,
        sm_push_bytes: int,
        puts_on_device: bool,
    ) -> CudaGroup: ...
    def close(self) -> None: ...
    def check(self) -> str | None: ...
    def stats(self) -> dict[str, int]: ...
    def memory_report(self) -> dict[str, int]: ...
    def trace(self) -> list[dict[str, Any]]: ...
    def start_wire_trace(self) -> None: ...
    def end_wire_trace(self) -> list[dict[str, Any]]: ...

class NvshmemMemory:
    """Only where `has_cuda`, as all that follows up to `LayoutConfig`."""

    @property
    def bytes(self) -> int: ...
    @property
    def in_use(self) -> bool: ...

def nvshmem_unique_id(library: str) -> bytes: ...
def nvshmem_join(
    *, library: str, unique_id: bytes, process: int, processes: int, device: int
) -> None: ...
def nvshmem_allocate(*, library: str, device: int, bytes: int) -> NvshmemMemory: ...
def gpu_bus_id(device: int) -> str: ...
def sees_gpu(bus_id: str) -> bool: ...
def symmetric_bytes(config: GroupConfig) -> int: ...

puts_on_device: bool

class LayoutConfig:
    def __init__(
        self,
        *,
        num_ranks: int,
        ranks_per_node: int,
        num_experts: int,
        top_k: int,
        num_lanes: int,
        itemsize: int,
        hidden: int,
        max_tokens: int,
        differentiable: bool,
        hierarchical: bool,
    ) -> None: ...

has_cuda: bool
MAX_TIMEOUT_S: float

def cpu_targets() -> dict[str, Any]: ...
def cpu_types() -> dict[str, tuple[Any, Any]]: ...
def cuda_targets() -> dict[str, Any]: ...
def register_call_site(call_site: int, name: str) -> None: ...
def rdma_size_hint(layout_config: LayoutConfig) -> int: ...
def nvl_size_hint(layout_config: LayoutConfig) -> int: ...
def max_recv_rows(
    num_ranks: int, tokens: int, top_k: int, local_experts: int, expert_alignment: int
) -> int: ...
