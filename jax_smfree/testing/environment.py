# SPDX-License-Identifier: Apache-2.0
"""How a process learns its place in a multi-process JAX program, and joins it.

All launchers speak through environment variables. `detect` reads them, `initialize` acts on them,
`rank_environment` writes them for the processes that our own launcher starts. Nothing here imports
JAX before `initialize` has found that there is something to join.
"""

import dataclasses
import faulthandler
import functools
import hashlib
import os
import re
import signal
from collections.abc import Mapping
from typing import Any

COORDINATOR_ADDRESS = "JAX_COORDINATOR_ADDRESS"
NUM_PROCESSES = "JAX_NUM_PROCESSES"
PROCESS_ID = "JAX_PROCESS_ID"
RANK_LOG = "JAX_SMFREE_RANK_LOG"  # the file that our launcher gave to this process
CHANNEL = "JAX_SMFREE_CHANNEL"  # a file descriptor that ties a pytest worker to its main process

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
_FORCED_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\S*")


@dataclasses.dataclass(frozen=True)
class Rank:
    """The place of this process among those that one launcher started.

    Attributes:
      launcher: who says so, for messages.
      process_id: from 0 to ``num_processes - 1``.
      num_processes: how many the whole program has, over all hosts.
      options: the arguments of ``jax.distributed.initialize`` that follow from it.
    """

    launcher: str
    process_id: int
    num_processes: int
    options: Mapping[str, Any] = dataclasses.field(repr=False)


def detect(environ: Mapping[str, str] = os.environ) -> Rank | None:
    """The place that a launcher gave to this process, or ``None`` when it stands alone.

    Looked at in this order: the variables ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID`` (ours, or set by hand), Open MPI's ``mpirun``, SLURM's ``srun``. SLURM comes
    last because ``mpirun`` inside an allocation starts its own daemons through ``srun``.

    Raises:
      RuntimeError: for a part of the three JAX variables, and where a number is none.
    """
    if NUM_PROCESSES in environ or PROCESS_ID in environ:
        return _from_jax_variables(environ)
    if all(name in environ for name in _OPEN_MPI) and environ[_OPEN_MPI[0]] != "1":
        return _from_open_mpi(environ)
    if all(name in environ for name in _SLURM) and environ["SLURM_NTASKS"] != "1":
        process_id, num_processes = _numbers(environ, "SLURM_PROCID", "SLURM_NTASKS")
        # JAX finds the first host, a port, and one GPU per task by itself.
        return Rank("SLURM", process_id, num_processes, {"cluster_detection_method": "slurm"})
    return None


def initialize(**options: Any) -> bool:
    """Joins the multi-process program that this process was started as a part of.

    Call it before anything else that uses JAX. It works unchanged under
    ``python -m jax_smfree.testing.launch``, ``srun``, ``mpirun``, and with the variables
    ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` set by hand. Without
    any of them it does nothing, and nothing either when ``jax.distributed`` is up already.

    Args:
      **options: go to ``jax.distributed.initialize``, over what the launcher says.

    Returns:
      Whether this process is now a part of a ``jax.distributed`` program.

    Raises:
      RuntimeError: for incomplete or malformed variables, or when JAX has been used before.

    Example::

      from jax_smfree import testing

      testing.initialize()
      print(jax.process_index(), jax.local_devices(), jax.device_count())
    """
    if log := os.environ.get(RANK_LOG):
        _show_stacks_in(log)
    rank = detect()
    if rank is None:
        return False
    import jax

    if not jax.distributed.is_initialized():
        jax.distributed.initialize(**{**rank.options, **options})
    return True


def rank_environment(
    process_id: int,
    *,
    processes: int,
    devices_per_process: int,
    platform: str,
    address: str,
    base: Mapping[str, str],
) -> dict[str, str]:
    """The environment of one process that our launcher starts on this host.

    On the CPU the devices are virtual ones. On GPUs, JAX in process ``i`` uses the ``i``-th part of
    ``devices_per_process`` GPUs of those that the launcher itself may use. The process sees the
    other processes' too, because copies to a GPU that it does not see are slow (docs/multihost.md).
    A list like ``0,1,0,1`` makes processes share GPUs.

    Raises:
      ValueError: for a platform that is neither ``"cpu"`` nor ``"cuda"``, or too few GPUs.
    """
    env = dict(base)
    env[COORDINATOR_ADDRESS] = address
    env["JAX_COORDINATOR_BIND_ADDRESS"] = address
    env[NUM_PROCESSES] = str(processes)
    env[PROCESS_ID] = str(process_id)
    env.setdefault("PYTHONFAULTHANDLER", "1")  # a crash leaves its Python stack in the log
    env["PYTHONUNBUFFERED"] = "1"  # a killed process leaves all that it printed
    if any(name.lower().endswith("_proxy") for name in env):
        env["no_grpc_proxy"] = "127.0.0.1"  # else the coordinator is asked for through the proxy
    flags = _FORCED_DEVICES.sub("", env.get("XLA_FLAGS", ""))
    env.pop("JAX_NUM_CPU_DEVICES", None)  # says the same as the flag, and JAX takes only one
    env.pop("JAX_LOCAL_DEVICE_IDS", None)  # of a program that launches another one
    if platform == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
        flags += f" --xla_force_host_platform_device_count={devices_per_process}"
    elif platform == "cuda":
        env["JAX_PLATFORMS"] = "cuda,cpu"
        gpus = visible_gpus(base)
        mine = gpus[process_id * devices_per_process :][:devices_per_process]
        if len(mine) < devices_per_process:
            raise ValueError(
                f"got {len(gpus)} visible GPUs, expected {processes * devices_per_process} for "
                f"{processes} processes with {devices_per_process} each. Ask for fewer, or set "
                "CUDA_VISIBLE_DEVICES."
            )
        used = list(dict.fromkeys(gpus[: processes * devices_per_process]))
        env["CUDA_VISIBLE_DEVICES"] = ",".join(used)
        env["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(used.index(gpu)) for gpu in mine)
    else:
        raise ValueError(f"got platform={platform!r}, expected 'cpu' or 'cuda'.")
    env["XLA_FLAGS"] = flags.strip()
    return env


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs of this host that a process may use, as ``CUDA_VISIBLE_DEVICES`` writes them."""
    if (chosen := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    nodes = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    return [str(i) for i in range(len(nodes))]


@functools.cache
def _show_stacks_in(log: str) -> None:
    """Lets our launcher ask a process that hangs for its stacks before it ends it.

    They go to the log and not to stderr, because pytest redirects that.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)


def _numbers(environ: Mapping[str, str], *names: str) -> list[int]:
    for name in names:
        if not environ[name].isdecimal():
            raise RuntimeError(
                f"got the environment variable {name}={environ[name]!r}, expected a number. Unset "
                "it, or start the program with a launcher, which sets it."
            )
    return [int(environ[name]) for name in names]


def _from_jax_variables(environ: Mapping[str, str]) -> Rank:
    wanted = (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID)
    missing = [name for name in wanted if name not in environ]
    if missing:
        raise RuntimeError(
            f"got {', '.join(sorted(set(wanted) - set(missing)))} without {', '.join(missing)}, "
            "expected all three environment variables or none. Set the missing ones, for example "
            f"{COORDINATOR_ADDRESS}=127.0.0.1:12345, or unset the others."
        )
    process_id, num_processes = _numbers(environ, PROCESS_ID, NUM_PROCESSES)
    options = {
        "coordinator_address": environ[COORDINATOR_ADDRESS],
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }
    return Rank("the JAX_* variables", process_id, num_processes, options)


def _from_open_mpi(environ: Mapping[str, str]) -> Rank:
    """Open MPI tells rank and size; the coordinator's address is ours to find.

    JAX derives it from Open MPI 4's variables. Open MPI 5 has none with the first host's name: on
    one host we take a port that all ranks compute from the job's name, over several hosts JAX has
    to ask mpi4py.
    """
    num_processes, process_id, local_id = _numbers(environ, *_OPEN_MPI)
    options: dict[str, Any] = {"num_processes": num_processes, "process_id": process_id}
    if "JAX_LOCAL_DEVICE_IDS" not in environ:
        options["local_device_ids"] = [local_id]
    if COORDINATOR_ADDRESS in environ:
        options["cluster_detection_method"] = "deactivate"
    elif "OMPI_MCA_orte_hnp_uri" in environ:
        options["cluster_detection_method"] = "ompi"
    elif environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(num_processes):
        job = hashlib.sha256(environ.get("PMIX_NAMESPACE", "").encode()).digest()
        # The 4096 ports above the range that Linux gives out by itself, as JAX does for SLURM.
        port = 61440 + int.from_bytes(job[:4], "big") % 4096
        options["coordinator_address"] = f"127.0.0.1:{port}"
        options["cluster_detection_method"] = "deactivate"
    else:
        options["cluster_detection_method"] = "mpi4py"
    return Rank("Open MPI", process_id, num_processes, options)
