# SPDX-License-Identifier: Apache-2.0
"""The processes of one multi-process program: started together, watched, and ended for certain."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from jax_smfree.testing.environment import CHANNEL, RANK_LOG, rank_environment

POLL_S = 0.02
_NOISE = re.compile(r'^  File "[^"]*/(_pytest|pluggy)/|^Extension modules: ')
_TIED_EXEC = Path(__file__).with_name("tied_exec.py")


class Processes:
    """N processes of one Python program on this host, each with its log, set up for JAX.

    Every process leads a session and process group of its own. Whatever happens to the starter,
    the processes end: leaving the ``with`` block kills the groups, and the kernel kills each
    process when the thread that started it is gone. A group's leftovers are killed as soon as its
    leader ends.

    Args:
      arguments: what follows ``python`` on the command line.
      processes: how many.
      devices_per_process: virtual CPU devices or GPUs of each.
      platform: ``"cpu"`` or ``"cuda"``.
      log_dir: an existing directory; process ``i`` writes to ``rank<i>.log`` in it.
      env: set on top of this process's environment.
      cwd: working directory.
      channels: for each process a file descriptor that stays open in it, named by a variable.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        processes: int,
        devices_per_process: int,
        platform: str,
        log_dir: Path,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        channels: Sequence[int] | None = None,
    ) -> None:
        self.logs = [log_dir / f"rank{i}.log" for i in range(processes)]
        self.returncodes: list[int | None] = [None] * processes
        self._popens: list[subprocess.Popen[bytes]] = []
        self._port = _reserve_port()
        address = f"127.0.0.1:{self._port.getsockname()[1]}"
        tied = [sys.executable, "-I", "-S", str(_TIED_EXEC), str(os.getpid()), sys.executable]
        try:
            for i, log in enumerate(self.logs):
                rank_env = rank_environment(
                    i,
                    processes=processes,
                    devices_per_process=devices_per_process,
                    platform=platform,
                    address=address,
                    base={**os.environ, **(env or {})},
                )
                rank_env[RANK_LOG] = str(log.absolute())
                if channels:
                    rank_env[CHANNEL] = str(channels[i])
                with log.open("ab") as out:
                    popen = subprocess.Popen(
                        [*tied, *arguments],
                        env=rank_env,
                        cwd=cwd,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=[channels[i]] if channels else [],
                    )
                self._popens.append(popen)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def poll(self) -> list[int | None]:
        """The return codes so far; negative for a signal, ``None`` for a running process."""
        for i, popen in enumerate(self._popens):
            if self.returncodes[i] is None and _has_ended(popen.pid):
                # Not reaped yet, so its id, which is its group's, cannot be anybody else's.
                _kill_group(popen.pid, signal.SIGKILL)
                self.returncodes[i] = popen.wait()
        return self.returncodes

    def wait(self, timeout_s: float) -> bool:
        """Waits until all have ended, and says whether they have."""
        deadline = time.monotonic() + timeout_s
        while None in self.poll():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        return True

    def dump_stacks(self) -> None:
        """Lets the running processes that called `initialize` write their stacks to their logs.

        To be followed by `kill`: the signal ends a process that did not call it.
        """
        for popen, code in zip(self._popens, self.poll(), strict=True):
            if code is None:
                os.kill(popen.pid, signal.SIGUSR1)
        self.wait(0.5)

    def kill(self, grace_s: float = 0.0) -> None:
        """Ends all that still run: politely when there is a ``grace_s``, and then for certain."""
        if grace_s > 0:
            self._signal_running(signal.SIGTERM)
            self.wait(grace_s)
        self._signal_running(signal.SIGKILL)
        for i, popen in enumerate(self._popens):
            if self.returncodes[i] is None:
                self.returncodes[i] = popen.wait()
        self._port.close()

    def _signal_running(self, number: signal.Signals) -> None:
        for popen, code in zip(self._popens, self.poll(), strict=False):  # fewer, if a start failed
            if code is None:
                _kill_group(popen.pid, number)


def describe_exit(returncode: int | None) -> str:
    """``"exited with code 3"``, ``"was killed by SIGSEGV"`` or ``"still ran"``."""
    if returncode is None:
        return "still ran"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-returncode}"


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log, without what tells nothing in the stacks of a dead process."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65_536))
        text = file.read().decode(errors="replace")
    return "\n".join([line for line in text.splitlines() if not _NOISE.search(line)][-lines:])


def _reserve_port() -> socket.socket:
    """A socket that keeps a free port from everybody but the coordinator.

    gRPC binds with SO_REUSEPORT, so it can bind beside a socket that has it too; the kernel gives
    the port to nobody else while this one is open.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def _has_ended(pid: int) -> bool:
    """Whether a child has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        pass
