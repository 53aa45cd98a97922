# SPDX-License-Identifier: Apache-2.0
"""Plain pytest: the main process gives marked tests to worlds of worker processes."""

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest

from _jax_smfree_pytest import LOGS_OPTION
from jax_smfree.testing import reports
from jax_smfree.testing.lockstep import teardown_until
from jax_smfree.testing.marks import Multihost, Shape, multihost, skip_reason
from jax_smfree.testing.world import World
from jax_smfree.testing.worlds import RankProgress, WorkerWorld, WorldError

_MAX_PROCESSES = 12  # of all worlds; idle ones cost a few hundred MB each, and no time


class Controller:
    """A pytest plugin that runs marked tests elsewhere, and reports them here.

    A world is started when the first test of its shape comes, and used by all later ones. When a
    process of it crashes or hangs, the world is killed, and the next test gets a new one.

    Attributes:
      world: what the fixture ``world`` gives to tests without the mark.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.world = World()
        self._config = config
        self._keep_logs: str | None = config.getoption(LOGS_OPTION)
        self._directory: Path | None = None
        self._worlds: dict[Shape, WorkerWorld] = {}  # the least recently used one first
        self._broken: dict[Shape, str] = {}
        self._ended_badly: list[str] = []
        self._failed = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Runs an item with the mark; leaves the others to pytest."""
        mark = multihost(item)
        if mark is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        try:
            phases = self._run(item, mark)
        except pytest.fail.Exception as error:  # the deadline of another plugin: pytest-timeout
            self._kill(mark.shape)
            phases = [reports.failed(item, "setup", str(error))]
        except BaseException:
            self._kill(mark.shape)
            raise
        for report in phases:
            if report.failed and self._directory is not None:
                self._failed = True
                report.sections.append(("multihost logs", str(self._directory)))
            item.ihook.pytest_runtest_logreport(report=report)
        # Fixtures of tests that ran here before, and that this one would have shared.
        call = pytest.CallInfo.from_call(
            lambda: teardown_until(item.session, nextitem),
            "teardown",
            reraise=(KeyboardInterrupt, pytest.exit.Exception),
        )
        if call.excinfo is not None:
            report = pytest.TestReport.from_item_and_call(item, call)
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Ends the workers; a crash in their exit is a failure too."""
        for shape in list(self._worlds):
            self._close(shape)
        if self._ended_badly and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self._directory is not None and not (self._failed or self._keep_logs):
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says where logs were kept, and what went wrong outside of tests."""
        if self._ended_badly:
            terminalreporter.section("multihost", red=True)
            terminalreporter.write_line("\n".join(self._ended_badly))
        if self._directory is not None:
            terminalreporter.write_line(f"multihost logs: {self._directory}")

    def pytest_unconfigure(self) -> None:
        """For sessions that ended before they finished."""
        for shape in list(self._worlds):
            self._kill(shape)

    def _run(self, item: pytest.Item, mark: Multihost) -> list[pytest.TestReport]:
        """The reports of the phases of one test."""
        if (reason := skip_reason(item, mark.shape)) is not None:
            return [reports.skipped(item, reason), reports.passed(item, "teardown")]
        try:
            world = self._world(item.session, mark.shape)
        except WorldError as error:
            # A new attempt takes seconds: the other tests of this shape fail at once.
            text = self._broken.setdefault(mark.shape, str(error))
            return [reports.failed(item, "setup", text), reports.passed(item, "teardown")]
        progress, text = world.run(item.nodeid, self._next(item, mark.shape), mark.timeout_s)
        if text:
            self._kill(mark.shape)
        return _merge_phases(item, progress, text)

    def _world(self, session: pytest.Session, shape: Shape) -> WorkerWorld:
        """The running world of a shape, or a new one, perhaps in the place of older ones."""
        if shape in self._broken:
            raise WorldError(self._broken[shape])
        world = self._worlds.pop(shape, None)
        if world is None:
            # Processes on GPUs want all of the memory.
            others = _MAX_PROCESSES - shape.processes if shape.platform == "cpu" else 0
            while self._worlds and sum(other.processes for other in self._worlds) > others:
                self._close(next(iter(self._worlds)))
            paths = dict.fromkeys(str(item.path) for item in session.items if multihost(item))
            world = WorkerWorld(self._config, shape, list(paths), self._new_directory(shape))
        self._worlds[shape] = world
        return world

    def _new_directory(self, shape: Shape) -> Path:
        if self._directory is None:
            wanted = self._keep_logs or tempfile.mkdtemp(prefix="multihost_")
            self._directory = Path(wanted).absolute()
        names = (self._directory / f"{shape}-{number}" for number in itertools.count())
        return next(path for path in names if not path.exists())

    def _next(self, item: pytest.Item, shape: Shape) -> str | None:
        """The next test that the same world will run, for which it keeps fixtures."""
        items = item.session.items
        for later in items[items.index(item) + 1 :]:
            mark = multihost(later)
            if mark and mark.shape == shape and skip_reason(later, shape) is None:
                return later.nodeid
        return None

    def _close(self, shape: Shape) -> None:
        if trouble := self._worlds.pop(shape).close():
            self._ended_badly.append(f"{shape}: {trouble}")
            self._failed = True

    def _kill(self, shape: Shape) -> None:
        if world := self._worlds.pop(shape, None):
            world.kill()


def _merge_phases(
    item: pytest.Item, progress: list[RankProgress], text: str
) -> list[pytest.TestReport]:
    """The reports of a test from those of all ranks, and from ``text`` about lost ranks."""
    if problem := next((rank.problem for rank in progress if rank.problem), ""):
        return [reports.failed(item, "setup", problem), reports.passed(item, "teardown")]
    merged: list[pytest.TestReport] = []
    for when in reports.PHASES:
        if when == "call" and not merged[0].passed:
            continue
        merged.append(
            reports.merge(
                [
                    rank.reports.get(when) or reports.failed(item, when, text, rank.lost)
                    for rank in progress
                ]
            )
        )
        if any(when not in rank.reports for rank in progress):
            return [*merged, *([] if when == "teardown" else [reports.passed(item, "teardown")])]
    if text:  # lost between the end of this test and the next one
        merged[-1] = reports.failed(item, "teardown", text, "crashed")
    return merged
