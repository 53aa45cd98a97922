# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin behind ``@pytest.mark.multihost``. See docs/testing.md.

A pytest process has one of three roles: the main process of plain pytest (`Controller`), a worker
of such a process (`WorkerSession`), or one of the processes that another launcher started
(`ExternalSession`). This module only finds out which one.
"""

import os

import pytest

from jax_smfree.testing.controller import LOGS_OPTION, Controller
from jax_smfree.testing.environment import CHANNEL, detect
from jax_smfree.testing.external import ExternalSession
from jax_smfree.testing.lockstep import PLUGIN, LockStep
from jax_smfree.testing.marks import SIGNATURE, TIMEOUT_INI, multihost
from jax_smfree.testing.worker import WorkerSession
from jax_smfree.testing.world import World


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--multihost-logs`` and the ini option ``multihost_timeout``."""
    parser.getgroup("multihost").addoption(
        "--multihost-logs",
        dest=LOGS_OPTION,
        metavar="DIR",
        help="keep the logs of worker processes in DIR (default: a temporary directory, kept when "
        "a test failed)",
    )
    parser.addini(TIMEOUT_INI, "deadline of a multihost test in seconds", default="120")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """A worker joins its world before a conftest can use a device or change a variable."""
    if CHANNEL in os.environ:
        early_config.pluginmanager.register(WorkerSession.start(), PLUGIN)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the mark, and the role of this process."""
    config.addinivalue_line(
        "markers",
        f"{SIGNATURE}: run the test in several JAX processes at once; the ini option "
        f"{TIMEOUT_INI} is the default deadline",
    )
    if not config.pluginmanager.has_plugin(PLUGIN):
        try:
            rank = detect()
        except RuntimeError as error:
            raise pytest.UsageError(f"multihost: {error}") from error
        role = Controller(config) if rank is None else ExternalSession(rank)
        config.pluginmanager.register(role, PLUGIN)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses wrong arguments of the mark before anything runs."""
    for item in items:
        multihost(item)


@pytest.fixture(scope="session")
def world(pytestconfig: pytest.Config) -> World:
    """The processes that run this test: ``rank``, ``num_processes``, ``barrier``, ``exchange``."""
    role: Controller | LockStep | None = pytestconfig.pluginmanager.get_plugin(PLUGIN)
    assert role is not None, "registered in pytest_configure"
    return role.world
