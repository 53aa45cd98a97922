# SPDX-License-Identifier: Apache-2.0
"""NVSHMEM's world, all processes of ``jax.distributed`` with one GPU each, and its memory."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import warnings
from pathlib import Path

import jax

from jax_smfree import _native
from jax_smfree._src import bootstrap

# In the order of their allocation, which is the same in all processes.
_blocks: list[_native.NvshmemMemory] = []
_joined = False


def library() -> str:
    """The host library in the wheel nvidia-nvshmem; ``""`` if the loader shall look for one."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder, "nvshmem/lib/libnvshmem_host.so.3")
        if path.exists():
            return str(path)
    return ""


def join(device: jax.Device, timeout_s: float) -> None:
    """Makes ``device`` this process's part of the world; collective, once for a process."""
    global _joined
    if _joined:
        return
    me, processes = jax.process_index(), list(range(jax.process_count()))
    unique_id = _native.nvshmem_unique_id(library()) if me == 0 else b""
    mine = {
        "unique_id": base64.b64encode(unique_id).decode(),
        "host": bootstrap.host_name(),
        "gpu": _native.gpu_bus_id(device.local_hardware_id),
    }
    texts = bootstrap.exchange(
        "EpGroup.create", "jax_smfree/nvshmem", json.dumps(mine), processes, me, timeout_s
    )
    hellos = list(map(json.loads, texts))
    _warn_of_hidden_gpus(mine["host"], hellos)
    _native.nvshmem_join(
        library=library(),
        unique_id=base64.b64decode(hellos[0]["unique_id"]),
        process=me,
        processes=len(processes),
        device=device.local_hardware_id,
    )
    _joined = True


def _warn_of_hidden_gpus(host: str, hellos: list[dict[str, str]]) -> None:
    hidden = [
        process
        for process, hello in enumerate(hellos)
        if hello["host"] == host and not _native.sees_gpu(hello["gpu"])
    ]
    if hidden:
        warnings.warn(
            f"EpGroup.create: the GPUs of processes {hidden} are on this host, and "
            f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r} hides them from "
            f"process {jax.process_index()}: each copy to them starts about 2 ms late. Let every "
            "process see all GPUs of its host, and choose one with "
            "jax.distributed.initialize(local_device_ids=...).",
            stacklevel=2,
        )


def memory(
    num_bytes: int, device: jax.Device, rendezvous: str, timeout_s: float
) -> _native.NvshmemMemory:
    """A block of at least so many bytes that no process uses; collective over the world.

    NVSHMEM frees memory with a barrier, which a group that is closed must not need. So blocks are
    kept for later groups: the smallest one that all processes have done with.
    """
    me, processes = jax.process_index(), list(range(jax.process_count()))
    free = [number for number, block in enumerate(_blocks) if not block.in_use]
    texts = bootstrap.exchange(
        "EpGroup.create", f"{rendezvous}/free", json.dumps(free), processes, me, timeout_s
    )
    everywhere = set.intersection(*(set(json.loads(text)) for text in texts))
    fitting = [_blocks[number] for number in everywhere if _blocks[number].bytes >= num_bytes]
    if fitting:
        best: _native.NvshmemMemory = min(
            fitting, key=lambda block: (block.bytes, _blocks.index(block))
        )
        return best
    block = _native.nvshmem_allocate(
        library=library(), device=device.local_hardware_id, bytes=num_bytes
    )
    _blocks.append(block)
    return block
