# SPDX-License-Identifier: Apache-2.0
"""Running and testing multi-process JAX programs on one host, or under a cluster's launcher.

environment.py   `initialize`: joins whichever launcher started this process
launch/          `launch` and ``python -m jax_smfree.testing.launch``: N processes of a program
world.py         `World`: barrier and exchange of values between the processes
plugin.py        what a session with ``@pytest.mark.multihost(processes=2, devices_per_process=2)``
                 tests does; pytest imports ``_jax_smfree_pytest`` in all others, and nothing here
marks.py         the arguments of that mark
controller.py    plain pytest: gives marked tests to worlds of worker processes
worlds.py        the worker processes of one world, as the main process sees them
worker.py        the pytest session inside a worker process
external.py      pytest under another launcher, where every process is a session already
lockstep.py      several pytest sessions run the same tests together, and share their outcome
reports.py       one test report out of those of all ranks
chaos.py         `chaos`: a mover that delays, reorders and stalls

Nothing here imports JAX before a process joins a program.
"""

from jax_smfree.testing.chaos import chaos
from jax_smfree.testing.environment import initialize
from jax_smfree.testing.launch import LaunchError, LaunchResult, ProcessResult, launch
from jax_smfree.testing.world import World

__all__ = [
    "LaunchError",
    "LaunchResult",
    "ProcessResult",
    "World",
    "chaos",
    "initialize",
    "launch",
]
