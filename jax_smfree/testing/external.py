# SPDX-License-Identifier: Apache-2.0
"""pytest under SLURM, mpirun or ``JAX_*`` variables: every process is a session, in lock step."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Generator

import pytest

from jax_smfree.testing.environment import Rank, initialize
from jax_smfree.testing.lockstep import LockStep
from jax_smfree.testing.marks import SURVIVORS_S, Shape, multihost

_HANG_EXIT_CODE = 124  # as timeout(1)


class ExternalSession(LockStep):
    """A pytest plugin that lets the sessions of all ranks run the marked tests together.

    The tests without the mark are deselected: they expect a JAX of one process.
    """

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank.process_id, rank.num_processes)
        self._rank = rank
        self._name = f"rank {rank.process_id} of {rank.num_processes}"
        self.active = False

    def pytest_report_collectionfinish(self) -> str:
        """Tells the processes' output apart."""
        return f"multihost: {self._name}, says {self._rank.launcher}"

    def join(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keeps the marked tests, and joins the other processes."""
        if config.option.collectonly:
            return
        marked = [item for item in items if multihost(item)]
        self.active = True
        config.hook.pytest_deselected(items=[item for item in items if not multihost(item)])
        items[:] = marked
        try:
            initialize()
        except RuntimeError as error:
            raise pytest.UsageError(
                f"multihost: cannot join the processes of {self._rank.launcher}: {error} If a "
                "module of the tests uses devices when it is imported, call "
                "jax_smfree.testing.initialize() at the top of conftest.py."
            ) from error
        import jax

        platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
        shape = Shape(jax.process_count(), jax.local_device_count(), platform)
        for item in items:
            mark = multihost(item)
            if mark and mark.shape != shape:
                reason = f"needs {mark.shape} (processes x devices), this run is {shape}"
                item.add_marker(pytest.mark.skip(reason=reason))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Meets the other ranks before a test, and watches its deadline."""
        mark = multihost(item)
        if not self.active or mark is None:
            return (yield)
        if problem := self.begin(item.nodeid, mark.timeout_s):
            pytest.exit(f"multihost: {problem}", returncode=pytest.ExitCode.INTERNAL_ERROR)
        self._watch(
            item.config, mark.timeout_s, f"{item.nodeid} was not over in {mark.timeout_s:g} s"
        )
        try:
            return (yield)
        finally:
            self._timer.cancel()

    def send(self, report: pytest.TestReport, config: pytest.Config) -> None:
        """Shortens the deadline when this rank has failed: the others may wait for it forever."""
        if report.failed:
            self._timer.cancel()
            self._watch(
                config,
                SURVIVORS_S,
                f"{report.nodeid} was not over on all ranks {SURVIVORS_S:g} s after it had failed "
                f"on this one, see below",
                report.longreprtext,
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Meets the other ranks at the end, so that those that still have tests learn of it."""
        if self.active and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            with contextlib.suppress(TimeoutError):
                self.begin("end of the session", timeout_s=0.0)

    def _watch(self, config: pytest.Config, seconds: float, what: str, details: str = "") -> None:
        self._timer = threading.Timer(seconds, self._give_up, [config, what, details])
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self, config: pytest.Config, what: str, details: str) -> None:
        """Ends this process, which nobody else would, and leaves the others to the launcher."""
        capture = config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)
        print(
            f"\nmultihost: {self._name} ends itself: {what}. Expected all ranks to come to the "
            "end. Look in their stacks for something that not all of them take part in, or raise "
            f"timeout_s in the mark.\n{details}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(_HANG_EXIT_CODE)
