# SPDX-License-Identifier: Apache-2.0
"""The lab: processes whose GPUs reach one another over TCP alone, with no network card.

NVSHMEM's transport ``ucx`` carries the puts between hosts made of namespaces. Its heap is in host
memory, where `gdr_stand_in.cc` stands in for GDRCopy. Without root the processes are on one host,
where ``NVSHMEM_DISABLE_P2P`` sends what they say over TCP, too. Without GPUs they are CPU devices,
and their groups are portable ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_smfree import _native
from jax_smfree._src import nvshmem
from jax_smfree.doctor.network import library_version
from jax_smfree.testing.environment import visible_gpus
from jax_smfree.testing.launch.arguments import command_line
from network import hosts
from network.cable import Quality
from network.hosts import Ended, Process

TESTS = Path(__file__).parent.parent
_STAND_IN = Path(__file__).with_name("gdr_stand_in.cc")
_LEAST_NVSHMEM = (3, 8)  # older ones overwrite UCX_TLS, by transports that need a card
# Warnings that are errors otherwise: a group over two hosts is portable; those of other packages,
# of which ml_dtypes has to be imported before.
_WARNINGS = ("-W", "ignore:EpGroup.create", "-p", "ml_dtypes", "-p", "no:benchmark")
_EXTRA = "pip install '.[network-lab]'"


def missing() -> str | None:
    """Why GPUs of this machine cannot be in the lab, or ``None``."""
    if not visible_gpus():
        return "needs a GPU"
    if not (_native.has_cuda and _native.puts_on_device):
        return "needs jax_smfree built with CUDA and NVSHMEM"
    if importlib.util.find_spec("libucx") is None:
        return f"needs UCX: {_EXTRA}"
    library = nvshmem.library()
    if not library or tuple(map(int, library_version(Path(library)).split("."))) < _LEAST_NVSHMEM:
        return f"needs NVSHMEM {'.'.join(map(str, _LEAST_NVSHMEM))} or newer: {_EXTRA}"
    if shutil.which("c++") is None:
        return f"needs a C++ compiler `c++`, which builds {_STAND_IN.name}"
    return None


def build_stand_in(directory: Path) -> None:
    """Makes ``libgdrapi.so.2`` there."""
    library = directory / "libgdrapi.so.2"
    options = "-O1 -std=c++17 -Wall -shared -fPIC".split()
    subprocess.run(["c++", *options, str(_STAND_IN), "-o", str(library)], check=True)


def gpu_environment(stand_in: Path, heap: str, namespaces: bool) -> dict[str, str]:
    """Variables of a process whose GPU is in the lab; ``heap`` is the size of NVSHMEM's."""
    spec = importlib.util.find_spec("libucx")
    assert spec is not None and spec.origin is not None
    ucx = Path(spec.origin).parent / "lib"
    others = os.environ.get("LD_LIBRARY_PATH", "")
    one_host = {} if namespaces else {"NVSHMEM_DISABLE_P2P": "1"}
    return one_host | {
        "LD_LIBRARY_PATH": os.pathsep.join([str(stand_in), str(ucx), others]),
        "UCX_MODULE_DIR": str(ucx / "ucx"),
        "UCX_TLS": "tcp,self,sm,cuda_copy",
        "NVSHMEM_REMOTE_TRANSPORT": "ucx",
        "NVSHMEM_HEAP_KIND": "SYSMEM",
        "NVSHMEM_DISABLE_CUDA_VMM": "1",
        "NVSHMEM_SYMMETRIC_SIZE": heap,
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    }


class OneHost:
    """This one, in the place of both: a `Host` without namespaces and without a cable."""

    name, address = "here", "127.0.0.1"

    def __init__(self) -> None:
        with socket.create_server((self.address, 0)) as free:
            self.coordinator = f"{self.address}:{free.getsockname()[1]}"
        self._files_before = set(os.listdir("/dev/shm"))
        self._processes: list[Process] = []

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
        with log.open("wb") as out:
            popen = subprocess.Popen(
                command, env=dict(env), cwd=log.parent, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._processes.append(Process(popen, log, nsenter=False))
        return self._processes[-1]

    def left_over(self) -> set[str]:
        """Sessions of its processes that have a process, and new files in /dev/shm."""
        found = set(os.listdir("/dev/shm")) - self._files_before
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, 0)
                found.add(f"process {process.popen.pid}")
        return found

    def end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where a test starts processes.

    Attributes:
      directory: of their logs.
      stand_in: the directory of `build_stand_in`; ``None`` for CPU devices.
      two_hosts: whether there can be two.
    """

    directory: Path
    stand_in: Path | None
    two_hosts: bool

    @contextlib.contextmanager
    def hosts(self, quality: Quality | None = None) -> Iterator[Sequence[Any]]:
        """Two hosts with a cable of that ``quality``, or this one twice."""
        with contextlib.ExitStack() as ends:
            if self.two_hosts:
                size = "64g" if self.stand_in else "1g"
                yield ends.enter_context(hosts.two_hosts(self.directory, size, quality))
            else:
                here = OneHost()
                ends.callback(here.end)
                yield here, here

    def start(
        self,
        at: Sequence[Any],
        program: Callable[..., None] | Sequence[str],
        *args: Any,
        per_host: int = 1,
        heap: str = "1G",
        env: Mapping[str, str] | None = None,
    ) -> list[Process]:
        """Starts ``program``, as `jax_smfree.testing.launch` takes it, ``per_host`` times each."""
        common = {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
        if self.stand_in is None:
            common["XLA_FLAGS"] = (
                "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
            )
        else:
            common |= gpu_environment(self.stand_in, heap, self.two_hosts)
        command = [sys.executable, *command_line(program, args)]
        return hosts.launch(at, command, self.directory, common | dict(env or {}), per_host)

    def run_tests(
        self, at: Sequence[Any], file: str, which: str, per_host: int = 1, heap: str = "2G"
    ) -> list[Ended]:
        """The tests ``which`` of a file, by a pytest in each process; some pass, and none fails."""
        backend = "cpu" if self.stand_in is None else "cuda"
        options = ["--backend", backend, "-rP", "-p", "no:cacheprovider", *_WARNINGS]
        command = ["-m", "pytest", f"{TESTS}/{file}", "-k", which, *options]
        processes = self.start(at, command, per_host=per_host, heap=heap)
        results = [process.wait(400) for process in processes]
        for ended in results:
            assert ended.returncode == 0 and re.search(r"\d+ passed", ended.text), ended.text
        return results


def told(text: str) -> dict[str, Any]:
    """What a process has told so far, see `multiprocess.programs.tell`."""
    found: dict[str, Any] = {}
    for line in re.findall("^TOLD (.*)$", text, re.MULTILINE):
        found |= json.loads(line)
    return found


def wait_until_all_run(processes: Sequence[Process], timeout_s: float = 120.0) -> None:
    """Raises `AssertionError` with what they wrote, if they do not come so far."""
    deadline = time.monotonic() + timeout_s
    while not all(told(process.log.read_text()).get("runs") for process in processes):
        texts = [process.log.read_text() for process in processes]
        assert all(process.popen.poll() is None for process in processes), texts
        assert time.monotonic() < deadline, texts
        time.sleep(0.02)
