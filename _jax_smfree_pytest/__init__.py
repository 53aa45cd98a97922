# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin's door: all of jax_smfree that a session without a ``multihost`` test imports.

pytest imports the plugins of every installed package, in the sessions of every project. So this one
declares the mark, its options and the fixture ``world``, and imports `jax_smfree.testing.plugin`
only when a selected test has the mark or uses the fixture. It is not a module of ``jax_smfree``
because that package would be imported before it. See docs/testing.md.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from jax_smfree.testing import World

MARK = "multihost"
SIGNATURE = "multihost(processes=2, devices_per_process=2, platform='cpu', timeout_s=None)"
TIMEOUT_INI = "multihost_timeout"
LOGS_OPTION = "multihost_logs"

# Taken before pytest adds the directories of tests: a worker process starts as this one did.
SYS_PATH = tuple(sys.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--multihost-logs`` and the ini option ``multihost_timeout``."""
    parser.getgroup(MARK).addoption(
        "--multihost-logs",
        dest=LOGS_OPTION,
        metavar="DIR",
        help="keep the logs of worker processes in DIR (default: a temporary directory, kept when "
        "a test failed)",
    )
    parser.addini(TIMEOUT_INI, "deadline of a multihost test in seconds", default="120")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the mark."""
    config.addinivalue_line(
        "markers",
        f"{SIGNATURE}: run the test in several JAX processes at once; the ini option "
        f"{TIMEOUT_INI} is the default deadline",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Opens the door for a session that has selected a marked test."""
    if any(item.get_closest_marker(MARK) for item in items):
        from jax_smfree.testing import plugin

        plugin.enter(config, items)


@pytest.fixture(scope="session")
def world(pytestconfig: pytest.Config) -> World:
    """The processes that run this test: ``rank``, ``num_processes``, ``barrier``, ``exchange``."""
    from jax_smfree.testing import plugin

    return plugin.world_of(pytestconfig)
