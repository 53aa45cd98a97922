# SPDX-License-Identifier: Apache-2.0
"""The native groups behind an `EpGroup`: one for each replica that has ranks in this process.

Both functions put what they make onto a stack, which closes it when a later step fails.
"""

from __future__ import annotations

import collections
import json
from contextlib import ExitStack
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from jax_smfree import _native
from jax_smfree._src import bootstrap, compat, nvshmem
from jax_smfree._src.config import EpConfig
from jax_smfree._src.errors import SmfreeError
from jax_smfree._src.native_config import native_config

NativeGroup: TypeAlias = "_native.CpuGroup | _native.CudaGroup"
# For isinstance; an empty tuple where there is none.
CUDA_GROUP: Any = _native.CudaGroup if _native.has_cuda else ()

_met: collections.Counter[str] = collections.Counter()


def platform(mesh: Mesh) -> str:
    """``"cpu"`` or ``"CUDA"``, as `targets.register` has them.

    Raises:
      ValueError: for devices without a backend.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return "cpu"
    if compat.is_nvidia(device):
        return "CUDA"
    raise ValueError(
        f"EpGroup.create: got a mesh of {device.device_kind} (platform {device.platform!r}), "
        "expected GPUs of NVIDIA, or CPU devices: jax_smfree has no backend for others. A mesh "
        "of CPU devices runs anywhere: Mesh(jax.devices('cpu'), ...)."
    )


def _replicas(mesh: Mesh, axis: str) -> list[list[jax.Device]]:
    """The devices of each group along ``axis``, by the coordinates of the other axes."""
    position = mesh.axis_names.index(axis)
    return [
        list(devices)
        for devices in np.moveaxis(mesh.devices, position, -1).reshape(-1, mesh.shape[axis])
    ]


def nodes_of_ranks(mesh: Mesh, axis: str, timeout_s: float) -> list[list[int]]:
    """Of each group along ``axis``, in which node its ranks are: a process on CPUs, a host on GPUs.

    Nodes are named by their first process. Collective over the processes of a mesh of GPUs. GPUs
    that one only compiles for count as one node.
    """
    devices = list(mesh.devices.flat)
    processes = sorted({device.process_index for device in devices})
    node = {process: process for process in processes}
    if devices[0].platform != "cpu":
        hosts = _hosts(devices, processes, timeout_s)
        node = {p: processes[hosts.index(host)] for p, host in zip(processes, hosts, strict=True)}
    return [[node[device.process_index] for device in group] for group in _replicas(mesh, axis)]


def _hosts(devices: list[jax.Device], processes: list[int], timeout_s: float) -> list[str]:
    """The names of the hosts of ``processes``."""
    mine = bootstrap.host_name()
    if compat.is_compile_only(devices[0]) or len(processes) == 1:
        return [mine] * len(processes)
    key = f"{_meeting_place(devices)}/host"
    return bootstrap.exchange(key, mine, processes, jax.process_index(), timeout_s)


def cuda_groups(
    made: ExitStack, group_id: int, mesh: Mesh, axis: str, config: EpConfig, fingerprint: str
) -> list[NativeGroup]:
    """On the GPUs of one process; or on one GPU of every process, collective over them."""
    if not _native.has_cuda:
        raise SmfreeError(
            "EpGroup.create: got a mesh of GPUs, and this installation of jax_smfree was built "
            "without CUDA. Install it from its sources where nvcc is on PATH; or run with "
            "JAX_PLATFORMS=cpu."
        )
    me = jax.process_index()
    here = [device for device in mesh.devices.flat if device.process_index == me]
    try:
        if len(here) == mesh.size:
            return _cuda_groups_here(made, group_id, mesh, axis, config)
        return [_cuda_group_among_processes(made, group_id, mesh, axis, config, fingerprint)]
    except RuntimeError as error:
        raise SmfreeError(f"EpGroup.create: {error}") from error


def _cuda_groups_here(
    made: ExitStack, group_id: int, mesh: Mesh, axis: str, config: EpConfig
) -> list[NativeGroup]:
    groups: list[NativeGroup] = []
    for replica, devices in enumerate(_replicas(mesh, axis)):
        group = _native.CudaGroup(
            group_id=group_id,
            replica=replica,
            config=native_config(config, len(devices)),
            devices=[device.local_hardware_id for device in devices],
        )
        made.callback(group.close)
        groups.append(group)
    return groups


def _cuda_group_among_processes(
    made: ExitStack, group_id: int, mesh: Mesh, axis: str, config: EpConfig, fingerprint: str
) -> NativeGroup:
    me, world = jax.process_index(), list(range(jax.process_count()))
    processes = sorted(device.process_index for device in mesh.devices.flat)
    if processes != world:
        raise SmfreeError(
            f"EpGroup.create: got a mesh of GPUs of processes {processes}, expected one of each of "
            f"the {len(world)} processes, or all of one process. Start a process per GPU, "
            "jax.distributed.initialize(local_device_ids=...); what exchanges rows apart from one "
            "another goes onto further axes of the mesh."
        )
    (mine,) = (device for device in mesh.devices.flat if device.process_index == me)
    ((replica, devices),) = (
        (replica, devices)
        for replica, devices in enumerate(_replicas(mesh, axis))
        if mine in devices
    )
    key = _meeting_place(list(mesh.devices.flat))
    _agree(key, fingerprint, world, me, config.timeout_s)
    native = native_config(config, len(devices))
    nvshmem.join(mine, config.timeout_s)
    group = _native.CudaGroup.among_processes(
        group_id=group_id,
        replica=replica,
        config=native,
        rank=devices.index(mine),
        device=mine.local_hardware_id,
        process_of_rank=[device.process_index for device in devices],
        memory=nvshmem.memory(_native.symmetric_bytes(native), mine, key, config.timeout_s),
    )
    made.callback(group.close)
    # All memory is zero before anybody sends.
    bootstrap.exchange(f"{key}/ready", "", world, me, config.timeout_s)
    return group


def cpu_groups(
    made: ExitStack, group_id: int, mesh: Mesh, axis: str, config: EpConfig, fingerprint: str
) -> list[NativeGroup]:
    """On CPU devices of this host; collective over their processes."""
    me = jax.process_index()
    groups: list[NativeGroup] = []
    for replica, devices in enumerate(_replicas(mesh, axis)):
        process_of_rank = [device.process_index for device in devices]
        if me not in process_of_rank:
            continue
        processes = sorted(set(process_of_rank))
        key = _meeting_place(devices)
        secret = ""
        if len(processes) > 1:
            secret = _introduce(key, fingerprint, processes, me, config.timeout_s)
        group = _native.CpuGroup(
            group_id=group_id,
            replica=replica,
            config=native_config(config, len(devices)),
            process_of_rank=[processes.index(p) for p in process_of_rank],
            process=processes.index(me),
            secret=secret,
        )
        made.callback(group.close)
        groups.append(group)
        if len(processes) > 1:
            group.connect(
                bootstrap.exchange(
                    f"{key}/address", group.address(), processes, me, config.timeout_s
                )
            )
    return groups


def _meeting_place(devices: list[jax.Device]) -> str:
    """Where the n-th group of these devices meets, whatever its config, to compare configs."""
    place = f"jax_smfree/{[device.id for device in devices]}"
    number = _met[place]
    _met[place] += 1
    return f"{place}/{number}"


def _agree(
    key: str, fingerprint: str, processes: list[int], me: int, timeout_s: float
) -> list[dict[str, str]]:
    """Compares notes with the other processes; returns what each of them says of itself."""
    mine = {
        "host": bootstrap.host_name(),
        "fingerprint": fingerprint,
        "secret": bootstrap.new_secret(),
    }
    texts = bootstrap.exchange(f"{key}/hello", json.dumps(mine), processes, me, timeout_s)
    hellos: list[dict[str, str]] = list(map(json.loads, texts))
    for process, theirs in zip(processes, hellos, strict=True):
        if theirs["fingerprint"] != fingerprint:
            raise SmfreeError(
                f"EpGroup.create: process {process} creates {theirs['fingerprint']}, process "
                f"{me} creates {fingerprint}. All processes must use the same mesh, axis and "
                "config."
            )
    return hellos


def _introduce(key: str, fingerprint: str, processes: list[int], me: int, timeout_s: float) -> str:
    """The secret of the first of these processes, which are on this host."""
    hellos = _agree(key, fingerprint, processes, me, timeout_s)
    here = bootstrap.host_name()
    for process, theirs in zip(processes, hellos, strict=True):
        if theirs["host"] != here:
            raise SmfreeError(
                f"EpGroup.create: process {process} runs on host {theirs['host']!r}, process "
                f"{me} on {here!r}, expected one host: the CPU backend connects "
                "processes through shared memory."
            )
    return hellos[0]["secret"]
