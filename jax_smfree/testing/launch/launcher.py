# SPDX-License-Identifier: Apache-2.0
"""`launch`: runs one program as N JAX processes on this host, and tells what became of each."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jax_smfree.testing.launch import arguments
from jax_smfree.testing.launch.arguments import Program
from jax_smfree.testing.launch.processes import POLL_S, Processes, describe_exit, tail


class LaunchError(RuntimeError):
    """A launched program did not end with exit code 0 in all of its processes, or not in time."""


@dataclasses.dataclass(frozen=True)
class ProcessResult:
    """What became of one process.

    Attributes:
      rank: its ``jax.process_index()``.
      returncode: its exit code; negative for the signal that killed it.
      stopped: whether the launcher ended it.
      log: the file with its stdout and stderr.
    """

    rank: int
    returncode: int
    stopped: bool
    log: Path

    @property
    def text(self) -> str:
        """All that the process wrote."""
        return self.log.read_text(errors="replace")

    def __str__(self) -> str:
        what = "was stopped by the launcher" if self.stopped else describe_exit(self.returncode)
        return f"rank {self.rank} {what}"


@dataclasses.dataclass(frozen=True)
class LaunchResult:
    """What became of a launched program.

    Attributes:
      processes: the result of each rank.
      timed_out: whether the deadline passed.
      first_failed: the rank that was the first to end with anything but exit code 0, if any.
      elapsed_s: from the start to the end of the last process.
      log_dir: the directory of the logs.
    """

    processes: tuple[ProcessResult, ...]
    timed_out: bool
    first_failed: int | None
    elapsed_s: float
    log_dir: Path

    @property
    def ok(self) -> bool:
        """Whether every process ended by itself, in time and with exit code 0."""
        return not self.timed_out and all(p.returncode == 0 for p in self.processes)

    def summary(self) -> str:
        """What happened on each rank, with the end of each log."""
        lines = [f"launched {len(self.processes)} processes, {self.elapsed_s:.1f} s"]
        if self.timed_out:
            lines.append("the deadline passed before all of them had ended")
        if self.first_failed is not None:
            lines.append(f"rank {self.first_failed} failed first")
        for process in self.processes:
            lines += [f"--- {process}; end of {process.log}:", tail(process.log)]
        return "\n".join(lines)

    def check(self) -> "LaunchResult":
        """Returns itself.

        Raises:
          LaunchError: with the summary, unless everything went well.
        """
        if not self.ok:
            raise LaunchError(self.summary())
        return self


def launch(
    program: Program,
    *,
    args: Sequence[Any] = (),
    processes: int = 2,
    devices_per_process: int = 2,
    platform: str = "cpu",
    timeout_s: float = 120.0,
    survivors_s: float | None = 5.0,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    follow: TextIO | None = None,
) -> LaunchResult:
    """Runs one Python program as several JAX processes on this host, and waits for them.

    Each process gets its virtual CPU devices or its GPUs, the coordinator's address, its rank and
    a log. The program joins by calling `jax_smfree.testing.initialize` first. When `launch` returns
    or raises, nothing that it started in the processes' groups is left; when the caller itself is
    killed, the kernel kills the processes.

    Call it from a thread that outlives the call, which is any thread that waits for it.

    Args:
      program: a script's path; or a sequence, what follows ``python`` on the command line, such as
        ``["-m", "package.module"]``; or a function of a module's top level, called in each process.
      args: further command line arguments, or the function's arguments, which must be literals.
      processes: how many.
      devices_per_process: devices of each.
      platform: ``"cpu"`` or ``"cuda"``, which gives each process GPUs of its own.
      timeout_s: deadline of the whole program. Ranks that hang then write their stacks to the logs.
      survivors_s: how long the others may go on once a rank has failed; ``None``: until the
        deadline, for a test of what they do then.
      env: environment variables, on top of the caller's.
      cwd: working directory.
      log_dir: where ``rank<i>.log`` go, made if missing; by default a new temporary directory,
        which stays.
      follow: a stream to which rank 0's log is copied while it grows.

    Returns:
      What became of each process. Failures do not raise: see `LaunchResult.check`.

    Raises:
      ValueError, TypeError: for arguments outside of what is said above.

    Example::

      result = launch(["-m", "package.train", "--steps", "10"], processes=4).check()
      print(result.processes[0].text)
    """
    words = arguments.command_line(program, args)
    arguments.check_count("processes", processes)
    arguments.check_count("devices_per_process", devices_per_process)
    arguments.check_platform(platform)
    arguments.check_seconds("timeout_s", timeout_s)
    if survivors_s is not None:
        arguments.check_seconds("survivors_s", survivors_s)
    arguments.check_environment(env)
    arguments.check_directory("cwd", cwd, exists=True)
    arguments.check_directory("log_dir", log_dir, exists=False)
    directory = Path(log_dir or tempfile.mkdtemp(prefix="jax_smfree_launch_"))
    directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    deadline = start + timeout_s
    first_failed: int | None = None
    with (
        Processes(
            words,
            processes=processes,
            devices_per_process=devices_per_process,
            platform=platform,
            log_dir=directory,
            env=env,
            cwd=cwd,
        ) as running,
        running.logs[0].open() as rank0,
    ):
        while None in running.poll() and time.monotonic() < deadline:
            if first_failed is None:
                first_failed = next((i for i, c in enumerate(running.returncodes) if c), None)
                if first_failed is not None and survivors_s is not None:
                    deadline = min(deadline, time.monotonic() + survivors_s)
            if follow:
                follow.write(rank0.read())
                follow.flush()
            time.sleep(POLL_S)
        ended = list(running.poll())
        timed_out = None in ended and time.monotonic() >= start + timeout_s
        if None in ended:
            running.dump_stacks()
            running.kill(grace_s=1.0)
        if follow:
            follow.write(rank0.read())
            follow.flush()
    if first_failed is None:
        first_failed = next((i for i, code in enumerate(ended) if code), None)
    codes = [code for code in running.returncodes if code is not None]  # all, after the block
    results = (
        ProcessResult(rank, code, stopped=ended[rank] is None, log=log)
        for rank, (code, log) in enumerate(zip(codes, running.logs, strict=True))
    )
    elapsed_s = time.monotonic() - start
    return LaunchResult(tuple(results), timed_out, first_failed, elapsed_s, directory)
