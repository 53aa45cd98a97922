# SPDX-License-Identifier: Apache-2.0
"""What a pytest session with ``@pytest.mark.multihost`` tests does. See docs/testing.md.

Such a session has one of three roles: the main process of plain pytest (`Controller`), a worker of
such a process (`WorkerSession`, which has registered itself), or one of the processes that another
launcher started (`ExternalSession`). This module only finds out which one. ``_jax_smfree_pytest``,
which pytest imports in every session, calls it.
"""

import pytest

from jax_smfree.testing.controller import Controller
from jax_smfree.testing.environment import detect
from jax_smfree.testing.external import ExternalSession
from jax_smfree.testing.lockstep import PLUGIN, LockStep
from jax_smfree.testing.marks import multihost
from jax_smfree.testing.world import World


def enter(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Registers the role of this process, once the tests are selected.

    Raises:
      pytest.UsageError: for wrong arguments of a mark, or incomplete variables of a launcher.
    """
    for item in items:
        multihost(item)
    if config.pluginmanager.has_plugin(PLUGIN):
        return
    try:
        rank = detect()
    except RuntimeError as error:
        raise pytest.UsageError(f"multihost: {error}") from error
    if rank is None:
        config.pluginmanager.register(Controller(config), PLUGIN)
    else:
        session = ExternalSession(rank)
        config.pluginmanager.register(session, PLUGIN)
        session.join(config, items)


def world_of(config: pytest.Config) -> World:
    """What the fixture ``world`` gives: a world of one process where no test has the mark."""
    role: Controller | LockStep | None = config.pluginmanager.get_plugin(PLUGIN)
    return role.world if role else World()
