# SPDX-License-Identifier: Apache-2.0
"""What a result is worth nothing without: the machine, the versions, the commit, the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

_MEMORY_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD")


def _first(path: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return found.group(1).strip() if found else None


def _commit() -> str | None:
    """With ``+`` where the tree has changes that are not committed."""
    where = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **where, check=True)
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], **where, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def describe() -> dict[str, object]:
    """A JSON value."""
    memory_kb = _first("/proc/meminfo", r"MemTotal:\s*(\d+)")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _first("/proc/cpuinfo", r"model name\s*:\s*(.*)") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "last_level_cache": _first("/sys/devices/system/cpu/cpu0/cache/index3/size", r"(.*)"),
        "memory_gib": round(int(memory_kb) / 2**20) if memory_kb else None,
        "huge_pages": _first("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]"),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name in _MEMORY_VARIABLES or name.startswith("MALLOC_")
        },
    }
