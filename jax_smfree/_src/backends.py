# SPDX-License-Identifier: Apache-2.0
"""The native groups behind an `EpGroup`: one for each replica that has ranks in this process.

What is made goes onto a stack, which closes it when a later step fails.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import warnings
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias

import jax
from jax.sharding import Mesh

from jax_smfree import _native
from jax_smfree._src import bootstrap, compat, nvshmem
from jax_smfree._src.config import EpConfig
from jax_smfree._src.errors import SmfreeError
from jax_smfree._src.native_config import native_config
from jax_smfree._src.portable_reports import PortableGroup

NativeGroup: TypeAlias = "_native.CpuGroup | _native.CudaGroup | PortableGroup"
Backend: TypeAlias = Literal["cpu", "cuda", "portable"]
Replicas: TypeAlias = list[list[jax.Device]]  # by rank, see `group_axis.replicas`
# For isinstance; an empty tuple where there is none.
CUDA_GROUP: Any = _native.CudaGroup if _native.has_cuda else ()

_CREATE = "EpGroup.create"  # the call that errors name


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What the processes of a mesh have told one another before they create a group.

    Attributes:
      rendezvous: where they meet again, see `bootstrap`.
      processes: of the mesh, ascending; a mesh that one only compiles for has none to meet.
      hosts: their names, in the same order.
      ordinal: which group of its kind it is, the same in all of them.
      secret: what guards their sockets.
    """

    rendezvous: str
    processes: list[int]
    hosts: list[str]
    ordinal: int
    secret: str

    def host_of(self, process: int) -> str:
        return self.hosts[self.processes.index(process)]


def meet(mesh: Mesh, fingerprint: str, ordinal: int, timeout_s: float) -> Meeting:
    """Collective over the processes of the mesh, which compare notes.

    ``ordinal``: how many groups of this ``fingerprint`` this process has made. The largest counts,
    since a process may have made some that others missed.

    Raises:
      SmfreeError: a process did not come, or makes another group.
    """
    me = jax.process_index()
    devices = list(mesh.devices.flat)
    processes = sorted({device.process_index for device in devices})
    ids = hashlib.sha256(str([device.id for device in devices]).encode()).hexdigest()[:16]
    rendezvous = f"jax_smfree/group/{ids}"
    host, secret = bootstrap.host_name(), bootstrap.new_secret()
    if compat.is_compile_only(devices[0]) or processes == [me] or me not in processes:
        return Meeting(rendezvous, processes, [host] * len(processes), ordinal, secret)
    mine = {"host": host, "fingerprint": fingerprint, "ordinal": ordinal, "secret": secret}
    texts = bootstrap.exchange(
        _CREATE, f"{rendezvous}/hello", json.dumps(mine), processes, me, timeout_s
    )
    hellos: list[dict[str, Any]] = list(map(json.loads, texts))
    for process, theirs in zip(processes, hellos, strict=True):
        if theirs["fingerprint"] != fingerprint:
            raise SmfreeError(
                f"EpGroup.create: process {process} creates {theirs['fingerprint']}, process "
                f"{me} creates {fingerprint}. All processes must use the same mesh, axis and "
                "config."
            )
    return Meeting(
        rendezvous=rendezvous,
        processes=processes,
        hosts=[hello["host"] for hello in hellos],
        ordinal=max(hello["ordinal"] for hello in hellos),
        secret=hellos[0]["secret"],
    )


def choose(replicas: Replicas, meeting: Meeting) -> Backend:
    """The same in all processes; called by `EpGroup.create`, whose caller is warned."""
    if compat.is_nvidia(replicas[0][0]):
        return "cuda"
    why = _why_portable(replicas, meeting)
    if why is None:
        return "cpu"
    warnings.warn(
        f"EpGroup.create: got {why}. The group is portable: it exchanges rows through JAX's own "
        "collectives, with the same results, but no rows move while other work runs. See "
        "docs/multihost.md.",
        stacklevel=3,
    )
    return "portable"


def _why_portable(replicas: Replicas, meeting: Meeting) -> str | None:
    """What neither NVIDIA GPUs nor the CPU devices of one host are."""
    device = replicas[0][0]
    if device.platform != "cpu":
        return (
            f"a mesh of {device.device_kind} (platform {device.platform!r}), where the other "
            "backends need NVIDIA GPUs or CPU devices"
        )
    for devices in replicas:
        first, *others = sorted({device.process_index for device in devices})
        for process in others:
            if meeting.host_of(process) != meeting.host_of(first):
                return (
                    f"CPU devices of process {first} on host {meeting.host_of(first)!r} and of "
                    f"process {process} on {meeting.host_of(process)!r}, where the CPU backend "
                    "connects processes through the memory of one host"
                )
    return None


def nodes_of_ranks(replicas: Replicas, meeting: Meeting) -> list[list[int]]:
    """The nodes of each replica's ranks: a node is a process on CPUs, a host on GPUs.

    Nodes are named by their first process. GPUs that one only compiles for count as one node.
    """
    node = {process: process for process in meeting.processes}
    if replicas[0][0].platform != "cpu":
        for process, host in zip(meeting.processes, meeting.hosts, strict=True):
            node[process] = meeting.processes[meeting.hosts.index(host)]
    return [[node[device.process_index] for device in devices] for devices in replicas]


def native_groups(
    made: ExitStack,
    backend: Backend,
    group_id: int,
    replicas: Replicas,
    config: EpConfig,
    meeting: Meeting,
) -> list[NativeGroup]:
    """Those that have ranks in this process; collective over the meeting's processes.

    Raises:
      SmfreeError: also for what the native side reports.
    """
    if backend == "portable":
        return [PortableGroup()]
    make = _cpu_groups if backend == "cpu" else _cuda_groups
    try:
        return make(made, group_id, replicas, config, meeting)
    except SmfreeError:
        raise
    except RuntimeError as error:
        raise SmfreeError(f"EpGroup.create: {error}") from error


def _cuda_groups(
    made: ExitStack, group_id: int, replicas: Replicas, config: EpConfig, meeting: Meeting
) -> list[NativeGroup]:
    """On the GPUs of one process; or on one GPU of every process."""
    if not _native.has_cuda:
        raise SmfreeError(
            "EpGroup.create: got a mesh of GPUs, and this installation of jax_smfree was built "
            "without CUDA. Install it from its sources where nvcc is on PATH; or run with "
            "JAX_PLATFORMS=cpu."
        )
    if meeting.processes == [jax.process_index()]:
        return _cuda_groups_here(made, group_id, replicas, config)
    return [_cuda_group_among_processes(made, group_id, replicas, config, meeting)]


def _cuda_groups_here(
    made: ExitStack, group_id: int, replicas: Replicas, config: EpConfig
) -> list[NativeGroup]:
    groups: list[NativeGroup] = []
    for replica, devices in enumerate(replicas):
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
    made: ExitStack, group_id: int, replicas: Replicas, config: EpConfig, meeting: Meeting
) -> NativeGroup:
    me, world = jax.process_index(), list(range(jax.process_count()))
    of_mesh = list(itertools.chain(*replicas))
    processes = sorted(device.process_index for device in of_mesh)
    if processes != world:
        raise SmfreeError(
            f"EpGroup.create: got a mesh of GPUs of processes {processes}, expected one of each of "
            f"the {len(world)} processes, or all of one process. Start a process per GPU, "
            "jax.distributed.initialize(local_device_ids=...); what exchanges rows apart from one "
            "another goes onto further axes of the mesh."
        )
    (mine,) = (device for device in of_mesh if device.process_index == me)
    ((replica, devices),) = (
        (replica, devices) for replica, devices in enumerate(replicas) if mine in devices
    )
    native = native_config(config, len(devices))
    nvshmem.join(mine, config.timeout_s)
    group = _native.CudaGroup.among_processes(
        group_id=group_id,
        replica=replica,
        config=native,
        rank=devices.index(mine),
        device=mine.local_hardware_id,
        process_of_rank=[device.process_index for device in devices],
        memory=nvshmem.memory(
            _native.symmetric_bytes(native), mine, meeting.rendezvous, config.timeout_s
        ),
        name=f"/jax_smfree-{meeting.secret[:16]}-{replica}",
    )
    made.callback(group.close)
    # All memory is zero before anybody sends. The others have so long for theirs.
    patience_s = config.timeout_s + _native.MAKE_SECONDS
    bootstrap.exchange(_CREATE, f"{meeting.rendezvous}/ready", "", world, me, patience_s)
    group.all_are_here()
    return group


def _cpu_groups(
    made: ExitStack, group_id: int, replicas: Replicas, config: EpConfig, meeting: Meeting
) -> list[NativeGroup]:
    """On CPU devices; those of a group are on one host."""
    me = jax.process_index()
    groups: dict[int, _native.CpuGroup] = {}  # by replica
    members = []
    for replica, devices in enumerate(replicas):
        process_of_rank = [device.process_index for device in devices]
        processes = sorted(set(process_of_rank))
        members.append(processes)
        if me not in processes:
            continue
        groups[replica] = _native.CpuGroup(
            group_id=group_id,
            replica=replica,
            config=native_config(config, len(devices)),
            process_of_rank=[processes.index(p) for p in process_of_rank],
            process=processes.index(me),
            secret=meeting.secret,
        )
        made.callback(groups[replica].close)
    if not groups or len(meeting.processes) == 1:
        return list(groups.values())
    mine = {replica: group.address() for replica, group in groups.items()}
    texts = bootstrap.exchange(
        _CREATE,
        f"{meeting.rendezvous}/address",
        json.dumps(mine),
        meeting.processes,
        me,
        config.timeout_s,
    )
    addresses = dict(zip(meeting.processes, map(json.loads, texts), strict=True))
    for replica, group in groups.items():
        group.connect([addresses[process][str(replica)] for process in members[replica]])
    return list(groups.values())
