# SPDX-License-Identifier: Apache-2.0
"""`WorkerWorld`: the worker processes of one shape, as the main pytest process sees them."""

import contextlib
import dataclasses
import multiprocessing.connection
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from _jax_smfree_pytest import SYS_PATH
from jax_smfree.testing import reports, worker
from jax_smfree.testing.launch.processes import POLL_S, Processes, describe_exit, tail
from jax_smfree.testing.marks import SURVIVORS_S, Shape

START_S = 120.0  # to start, import, join and collect
SETTLE_S = 1.0  # to learn which processes die together
CLOSE_S = 15.0  # to leave jax.distributed and exit


class WorldError(Exception):
    """The processes of a world did not start."""


@dataclasses.dataclass
class RankProgress:
    """How far a rank came in a test.

    Attributes:
      reports: of the phases that it went through.
      problem: what kept it from running the test at all.
      lost: ``"crashed"``, ``"hung"`` or ``"waited"`` if it did not come to the end.
    """

    reports: dict[str, pytest.TestReport] = dataclasses.field(default_factory=dict)
    problem: str = ""
    lost: str = ""


class WorkerWorld:
    """Worker processes of one shape, each a pytest session, that run tests on demand.

    Args:
      config: of the main session.
      shape: how many processes and devices.
      paths: the test files that the workers collect.
      directory: for the logs and temporary directories of the workers.

    Raises:
      WorldError: when they did not all come up, with the ends of their logs.
    """

    def __init__(
        self, config: pytest.Config, shape: Shape, paths: Sequence[str], directory: Path
    ) -> None:
        self.directory = directory
        self._config = config
        self._allowed = ""
        directory.mkdir(parents=True)
        pipes = [multiprocessing.connection.Pipe() for _ in range(shape.processes)]
        self._connections = [ours for ours, _ in pipes]
        code = (
            f"import sys; sys.path[:] = {SYS_PATH!r}; import pytest; "
            f"sys.exit(pytest.main(plugins=[{worker.__name__!r}]))"
        )
        # What starts the processes has imported this package before pytest would have.
        imported = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
        self._processes = Processes(
            ["-c", code, "-W", imported, *map(str, config.invocation_params.args)],
            processes=shape.processes,
            devices_per_process=shape.devices_per_process,
            platform=shape.platform,
            log_dir=directory,
            cwd=config.invocation_params.dir,
            channels=[theirs.fileno() for _, theirs in pipes],
        )
        for _, theirs in pipes:
            theirs.close()
        try:
            for rank in range(shape.processes):
                self._tell(
                    rank,
                    paths=list(paths),
                    basetemp=str(directory / f"tmp{rank}"),
                    devices_per_process=shape.devices_per_process,
                )
            if lost := self._listen("ready", START_S):
                raise WorldError(f"The processes for {shape} did not start: {self.describe(lost)}")
        except BaseException:
            self.kill()
            raise

    def run(
        self, nodeid: str, next_nodeid: str | None, timeout_s: float
    ) -> tuple[list[RankProgress], str]:
        """Runs one test on all ranks.

        Returns:
          How far each came, and if any was lost, what happened. The world is useless then.
        """
        progress = [RankProgress() for _ in self._connections]

        def note(rank: int, message: dict[str, Any]) -> bool:
            if message["kind"] == "problem":
                progress[rank].problem = message["text"]
                return False
            report = reports.from_data(self._config, message["data"])
            progress[rank].reports[str(report.when)] = report
            return report.failed

        for rank in range(len(progress)):
            self._tell(rank, nodeid=nodeid, next=next_nodeid, timeout_s=timeout_s)
        lost = self._listen("done", timeout_s, note)
        if not lost:
            return progress, ""
        # The others wait for the crashed ranks, or else for those that came least far.
        culprits = {rank: kind for rank, kind in lost.items() if kind == "crashed"}
        if not culprits:
            behind = min(len(progress[rank].reports) for rank in lost)
            culprits = {r: kind for r, kind in lost.items() if len(progress[r].reports) == behind}
        for rank in lost:
            progress[rank].lost = culprits.get(rank, "waited")
        return progress, self.describe(culprits)

    def close(self) -> str:
        """Lets the workers end in order. Returns what went wrong with that, if anything."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + CLOSE_S
        while None in (codes := list(self._processes.poll())) and time.monotonic() < deadline:
            if any(codes):  # the others wait for a rank that has crashed
                deadline = min(deadline, time.monotonic() + SETTLE_S)
            time.sleep(POLL_S)
        self._processes.kill()
        return "\n".join(
            f"rank {rank} {describe_exit(code)} after its last test, log: {log}"
            for rank, (code, log) in enumerate(zip(codes, self._processes.logs, strict=True))
            if code not in (0, 1)  # 1: tests have failed
        )

    def kill(self) -> None:
        """Ends the workers at once."""
        self._processes.kill()
        for connection in self._connections:
            connection.close()

    def describe(self, lost: Mapping[int, str]) -> str:
        """What became of the lost ranks, the crashed ones first, with the ends of their logs."""
        crashed = [rank for rank, kind in lost.items() if kind == "crashed"]
        codes = self._processes.poll()
        if crashed:
            ends = {i: describe_exit(code) for i, code in enumerate(codes) if code is not None}
            what = [
                f"rank {rank} of {len(codes)} {ends.get(rank, 'ended its session')}"
                for rank in crashed
            ]
            cure = (
                "Expected it to outlive the test. A test in which a process shall die starts it "
                "with jax_smfree.testing.launch."
            )
        else:
            self._processes.dump_stacks()
            what = [f"rank {rank} of {len(codes)} did not finish {self._allowed}" for rank in lost]
            cure = (
                "Expected all ranks to come to the end. Look in the stacks below for something "
                "that not all ranks take part in, or raise timeout_s in the mark."
            )
        logs = [self._processes.logs[rank] for rank in crashed or lost]
        return "\n".join(
            [f"{'; '.join(what)}.", cure, *(f"--- end of {log}:\n{tail(log)}" for log in logs)]
        )

    def _tell(self, rank: int, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # listening will find that the rank is lost
            worker.send(self._connections[rank], **message)

    def _listen(
        self,
        last: str,
        timeout_s: float,
        note: Callable[[int, dict[str, Any]], bool] = lambda rank, message: False,
    ) -> dict[int, str]:
        """Takes messages until each rank sent ``last`` or crashed, or until the deadline.

        ``note`` is told of the other messages, and says which of them mean a failure.

        Returns:
          The ranks that did not send it, and whether they ``crashed`` or ``hung``.
        """
        waiting = dict(enumerate(self._connections))
        lost: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        self._allowed = f"within {timeout_s:g} s"
        while waiting and time.monotonic() < deadline:
            self._processes.poll()  # ends what a dead worker left, so that its pipe closes
            ready = multiprocessing.connection.wait(waiting.values(), POLL_S)
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                message = worker.receive(waiting[rank])
                if message is None:
                    lost[rank] = "crashed"
                    deadline = min(deadline, time.monotonic() + SETTLE_S)
                if message is None or message["kind"] == last:
                    del waiting[rank]
                elif note(rank, message) and time.monotonic() + SURVIVORS_S < deadline:
                    deadline = time.monotonic() + SURVIVORS_S
                    self._allowed = f"within {SURVIVORS_S:g} s after rank {rank} had failed"
        if lost:
            self._processes.wait(0.2)  # for their exit codes
        return lost | dict.fromkeys(waiting, "hung")
