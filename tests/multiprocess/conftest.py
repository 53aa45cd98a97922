# SPDX-License-Identifier: Apache-2.0
"""What a launched program may not leave behind."""

import os
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


def sockets() -> set[str]:
    """Names of this library's sockets on this host."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return {line.split()[-1] for line in lines if "@smfree-" in line}


@pytest.fixture
def no_leftovers():
    """Nothing in /dev/shm, no process and no socket survives the test."""

    def state():
        return {
            "/dev/shm": set(os.listdir("/dev/shm")),
            "children": children(),
            "sockets": sockets(),
        }

    before = state()
    yield
    after = state()
    left = {name: after[name] - before[name] for name in after}
    assert left == {name: set() for name in after}
