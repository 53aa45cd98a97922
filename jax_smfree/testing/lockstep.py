# SPDX-License-Identifier: Apache-2.0
"""Several pytest sessions, one per process, that run the same tests together."""

from collections.abc import Generator

import pytest

from jax_smfree.testing import reports
from jax_smfree.testing.world import World

PLUGIN = "jax_smfree_multihost"  # the name under which the role of this process is registered


class LockStep:
    """A pytest plugin that keeps the sessions of all ranks at the same phase of the same test.

    Before a test the ranks compare what they are about to run; after each phase they exchange
    their reports and go on with the merged one. So a rank whose setup failed does not leave the
    others waiting in the test's body, and all sessions end with the same result.

    Attributes:
      world: what the fixture ``world`` gives to tests.
      active: whether there is anything to keep in step.
    """

    active = True

    def __init__(self, rank: int, num_processes: int) -> None:
        self.world = World(rank, num_processes)
        self._own = World(rank, num_processes)
        self._number = 0
        self._patience_s = 60.0

    def begin(self, nodeid: str, timeout_s: float) -> str | None:
        """Meets the other ranks before a test. Returns how they differ, if they do."""
        self._patience_s = timeout_s + 30.0  # longer than the deadline, which has its own message
        self._number += 1
        self._own.enter(f"lockstep{self._number}")
        self.world.enter(f"test{self._number}")
        names = self._own.exchange(nodeid, name="next test", timeout_s=self._patience_s)
        if all(name == nodeid for name in names):
            return None
        what = "\n".join(f"  rank {rank}: {name}" for rank, name in enumerate(names))
        return (
            f"got different tests on the ranks:\n{what}\nExpected the same one. Start all of them "
            "with the same arguments, and make collection and its order independent of the rank."
        )

    def send(self, report: pytest.TestReport, config: pytest.Config) -> None:
        """Told of each phase of this rank, before it waits for the others."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Replaces the report of this rank by that of all."""
        report = yield
        if not self.active:
            return report
        self.send(report, item.config)
        data = reports.to_data(item.config, report)
        all_data = self._own.exchange(data, name=report.when, timeout_s=self._patience_s)
        return reports.merge([reports.from_data(item.config, data) for data in all_data])


def teardown_until(session: pytest.Session, item: pytest.Item | None) -> None:
    """Tears down the fixtures that ``item``, or nothing any more, needs.

    pytest does this after each test that it runs itself, and asserts at the next one that it was
    done. There is no public way to ask for it.
    """
    session._setupstate.teardown_exact(item)
