# SPDX-License-Identifier: Apache-2.0
"""Two hosts made of Linux namespaces on this machine, with a cable between them.

Each has a network, a host name, a /dev/shm and processes of its own, so that programs in them meet
over TCP only. A host lives as long as its first process, which reads a pipe of this one: however
this process ends, the kernel ends everything in the host, and the namespaces go with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jax_smfree.testing.environment import visible_gpus
from network.cable import Cable, Quality

_ABORTS_WITHIN_S = 10
_COORDINATOR_PORT = 12345  # of the first host, where nobody else is
_NAMESPACES = ("--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child")
# The name of the host stands in its own /etc/hosts: gloo looks it up. UCX looks up in /sys which
# interfaces there are, and those are of the network in which that was mounted.
_BOOT = """
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t sysfs sysfs /sys
mount -t tmpfs -o size="$3" tmpfs /dev/shm
echo up
exec cat
"""


def missing() -> str | None:
    """Why there can be no hosts here, or ``None``."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in {
        "ip": "iproute2",
        "unshare": "util-linux",
        "nsenter": "util-linux",
    }.items():
        if shutil.which(tool) is None:
            return f"network namespaces need `{tool}`: apt-get install {package}"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--mount-proc", "ip", "link", "add", "try", "type", "veth"],
        capture_output=True,
        text=True,
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus its signal, and what it wrote."""

    returncode: int
    text: str


@dataclasses.dataclass
class Process:
    """A process in a host, and the file that it writes to.

    ``nsenter``: whether ``popen`` is one, which waits for the process itself.
    """

    popen: subprocess.Popen[bytes]
    log: Path
    nsenter: bool = True

    def wait(self, timeout_s: float) -> Ended:
        """Raises `AssertionError` with what it wrote and where it hangs, if it does."""
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.signal(signal.SIGABRT)  # it writes where its threads are, and ends
                self.popen.wait(_ABORTS_WITHIN_S)
            raise AssertionError(
                f"still runs after {timeout_s} s:\n{self.log.read_text()}"
            ) from None
        return Ended(self.popen.returncode, self.log.read_text())

    def signal(self, number: signal.Signals) -> None:
        """To the process itself."""
        pid = self.popen.pid
        if self.nsenter:
            os.kill(int(Path(f"/proc/{pid}/task/{pid}/children").read_text()), number)
        if not self.nsenter or number == signal.SIGCONT:  # nsenter stops with its child
            os.kill(pid, number)


class Host:
    """Made by `two_hosts`.

    Attributes:
      name: its host name.
      address: its address on the cable.
      coordinator: where JAX's coordinator listens, if it is here.
      pid: its first process.
    """

    def __init__(self, name: str, address: str, hosts_file: Path, shm: str):
        self.name, self.address = name, address
        self.coordinator = f"{address}:{_COORDINATOR_PORT}"
        boot = ["bash", "-ec", _BOOT, "_", name, str(hosts_file), shm]
        self._first = subprocess.Popen(
            ["unshare", *_NAMESPACES, "--mount-proc", *boot],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._first.stdout is not None
        if self._first.stdout.readline() != b"up\n":
            raise RuntimeError(f"the host {name} did not come up, see stderr.")
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self.pid = int(children.read_text())
        self._processes: list[Process] = []

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
        """In the folder of its log: a clone's own one has a jax_smfree without native module."""
        with log.open("wb") as out:
            popen = subprocess.Popen(
                ["nsenter", "--target", str(self.pid), "--all", f"--wd={log.parent}", *command],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(Process(popen, log))
        return self._processes[-1]

    def run(self, *command: str) -> None:
        subprocess.run(["nsenter", "--target", str(self.pid), "--all", *command], check=True)

    def processes(self) -> set[int]:
        """All that run in it; `pid` is the first one."""
        found = set()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is no process
                if os.path.samefile(entry / "ns/pid", f"/proc/{self.pid}/ns/pid"):
                    found.add(int(entry.name))
        return found

    def left_over(self) -> set[str]:
        """Its processes but for the first one, and the files in its /dev/shm."""
        processes = {f"process {pid}" for pid in self.processes() - {self.pid}}
        return processes | set(os.listdir(f"/proc/{self.pid}/root/dev/shm"))

    def set_cable(self, state: str) -> None:
        """``"up"`` or ``"down"``: what is sent meanwhile is lost, and nobody is told."""
        self.run("ip", "link", "set", "cable", state)

    def end(self) -> None:
        """Everything in it is killed, and its end of the cable is gone. Idempotent."""
        assert self._first.stdin is not None and self._first.stdout is not None
        self._first.stdin.close()
        self._first.wait()
        self._first.stdout.close()
        for process in self._processes:
            process.popen.wait()


@contextlib.contextmanager
def two_hosts(
    directory: Path, shm: str = "1g", quality: Quality | None = None
) -> Iterator[tuple[Host, Host]]:
    """Hosts that reach each other; ``shm`` is the size of their /dev/shm.

    The cable is as good as this machine makes it, unless ``quality`` says how good it is.
    """
    names = {"hostA": "10.77.0.1", "hostB": "10.77.0.2"}
    hosts_file = directory / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    hosts_file.write_text("\n".join(lines) + "\n")
    with contextlib.ExitStack() as ends:
        hosts = []
        for name, address in names.items():
            hosts.append(Host(name, address, hosts_file, shm))
            ends.callback(hosts[-1].end)
        a, b = hosts
        if quality is None:
            veth = f"ip link add cable netns {a.pid} type veth peer cable netns {b.pid}"
            subprocess.run(veth.split(), check=True)
        else:
            ends.callback(Cable((a.pid, b.pid), quality).end)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "cable")
            host.run("ip", "link", "set", "lo", "up")
            host.set_cable("up")
        yield a, b


def launch(
    hosts: Sequence[Host],
    command: Sequence[str],
    directory: Path,
    more: Mapping[str, str],
    per_host: int = 1,
) -> list[Process]:
    """Starts ``command`` as a launcher of a cluster does, ``per_host`` times in every host.

    ``more``: variables beside the launcher's. The processes are numbered by host; ``NCCL_HOSTID``
    keeps NCCL from taking the hosts for one, and ``JAX_LOCAL_DEVICE_IDS`` gives each its GPU, which
    it may share with others.
    """
    processes = []
    gpus = list(dict.fromkeys(visible_gpus())) or [""]
    for number in range(per_host * len(hosts)):
        host = hosts[number // per_host]
        env = {name: v for name, v in os.environ.items() if not name.lower().endswith("_proxy")}
        env |= {
            "JAX_COORDINATOR_ADDRESS": hosts[0].coordinator,
            "JAX_NUM_PROCESSES": str(per_host * len(hosts)),
            "JAX_PROCESS_ID": str(number),
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            "JAX_LOCAL_DEVICE_IDS": str(number % len(gpus)),
            "NCCL_HOSTID": host.name,
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
        log = directory / f"{host.name}.{number}.log"
        processes.append(host.start(command, {**env, **more}, log))
    return processes
