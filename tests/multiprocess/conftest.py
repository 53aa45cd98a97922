# SPDX-License-Identifier: Apache-2.0
"""What a launched program may not leave behind."""

import os
import time
from pathlib import Path

import pytest


def children() -> set[int]:
    """Processes of this one, dead ones that nobody has waited for included."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it ended meanwhile
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            if parent == os.getpid():
                found.add(int(entry.name))
    return found


def shared_files() -> set[str]:
    """But for those of CUDA's driver, for processes that share a GPU: a killed one leaves them."""
    driver = ("cuda.shm.", "mps_shm_")
    return {name for name in os.listdir("/dev/shm") if not name.startswith(driver)}


@pytest.fixture
def no_leftovers():
    """No file in /dev/shm and no process survives the test.

    The sockets between processes have no name in a file system, and go with their owners.
    """
    before = children(), shared_files()
    yield
    deadline = time.monotonic() + 5  # for what others on this host have there for a moment
    while shared_files() - before[1] and time.monotonic() < deadline:
        time.sleep(0.1)
    after = children(), shared_files()
    assert after[0] - before[0] == set()
    assert after[1] - before[1] == set()
