# SPDX-License-Identifier: Apache-2.0
"""The pytest session in a worker process: runs the tests that the main process asks for."""

import atexit
import json
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from jax_smfree.testing import reports
from jax_smfree.testing.environment import CHANNEL, detect, initialize
from jax_smfree.testing.lockstep import PLUGIN, LockStep, teardown_until

# The main process has selected the tests, and reports on them: what concerns these two is off.
_NEUTRAL_OPTIONS: dict[str, Any] = {
    "cacheclear": False,
    "cacheshow": None,
    "collectonly": False,
    "deselect": None,
    "dist": "no",
    "durations": None,
    "failedfirst": False,
    "keyword": "",
    "lf": False,
    "markexpr": "",
    "maxfail": 0,
    "newfirst": False,
    "numprocesses": None,
    "stepwise": False,
    "stepwise_reset": False,
    "stepwise_skip": False,
    "trace": False,
    "tx": [],
    "usepdb": False,
    "xmlpath": None,
}
_CACHE_WRITERS = ("lfplugin", "nfplugin", "stepwiseplugin")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Joins the other workers before a conftest can use a device or change a variable."""
    early_config.pluginmanager.register(WorkerSession.start(), PLUGIN)


class WorkerSession(LockStep):
    """A session that collects like the main one, and runs what it is told until it hears no more.

    The connection carries JSON. To the worker: first its settings, then orders ``{nodeid, next,
    timeout_s}``. From the worker: ``ready``, then for every order its ``report`` of each phase and
    ``done``, or a ``problem`` that kept the test from running.
    """

    def __init__(self, connection: Connection) -> None:
        rank = detect()
        assert rank is not None, "the main process sets the variables"
        super().__init__(rank.process_id, rank.num_processes)
        self._connection = connection
        self._settings = receive(connection) or {}
        self._collect_errors: list[str] = []

    @classmethod
    def start(cls) -> "WorkerSession":
        """Joins the other workers, and checks its devices."""
        descriptor = int(os.environ.pop(CHANNEL))
        os.set_inheritable(descriptor, False)
        session = cls(Connection(descriptor))
        initialize(initialization_timeout=60, shutdown_timeout_seconds=10)
        # Runs before JAX's own, which waits for the others: a worker that cannot go on says so.
        atexit.register(session._connection.close)
        session._check_devices()
        return session

    def send(self, report: pytest.TestReport, config: pytest.Config) -> None:
        """Tells the main process, which has to know it even if the others never answer."""
        send(self._connection, kind="report", data=reports.to_data(config, report))

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> None:
        """Runs after the command line was read, and before anything acts on it."""
        for name, value in _NEUTRAL_OPTIONS.items():
            if hasattr(config.option, name):
                setattr(config.option, name, value)
        config.option.basetemp = Path(self._settings["basetemp"])
        config.args = self._settings["paths"]

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Leaves pytest's cache to the main process."""
        _unregister(session, *_CACHE_WRITERS)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remembers why a test may be missing."""
        if report.failed:
            self._collect_errors.append(f"{report.nodeid}:\n{report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Runs tests until the main process closes the connection."""
        items = {item.nodeid: item for item in session.items}
        send(self._connection, kind="ready")
        while (order := receive(self._connection)) is not None:
            item = items.get(order["nodeid"])
            problem = self.begin(item.nodeid if item else "not collected", order["timeout_s"])
            if item is None or problem:
                text = (
                    f"{order['nodeid']} is not collected in all worker processes. Expected the "
                    "tests of the main process: they must not depend on devices or variables."
                )
                text = "\n".join([text, *([problem] if problem else []), *self._collect_errors])
                send(self._connection, kind="problem", text=text)
            else:
                teardown_until(session, item)
                item.config.hook.pytest_runtest_protocol(
                    item=item, nextitem=items.get(order["next"])
                )
            send(self._connection, kind="done")
        # Its summary would take a second, for nobody.
        _unregister(session, "terminalreporter")
        return True

    def _check_devices(self) -> None:
        import jax

        got, expected = jax.local_device_count(), self._settings["devices_per_process"]
        if got != expected:
            raise pytest.UsageError(
                f"multihost: rank {self.world.rank} got {got} devices of {jax.devices()}, expected "
                f"{expected}. Something set XLA_FLAGS or JAX_NUM_CPU_DEVICES before pytest loaded "
                "the plugin; unset it."
            )


def _unregister(session: pytest.Session, *names: str) -> None:
    manager = session.config.pluginmanager
    for name in names:
        if manager.has_plugin(name):
            manager.unregister(name=name)


def send(connection: Connection, **message: Any) -> None:
    """Sends one message."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> dict[str, Any] | None:
    """The next message, or ``None`` when the other end is closed."""
    try:
        message: dict[str, Any] = json.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None
    return message
