# SPDX-License-Identifier: Apache-2.0
"""What a result is worth nothing without: the machine, the versions, the commit, the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.results import Json

_MEMORY_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD")
_GPU_FIELDS = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-nccl-cu13", "nvidia-nccl-cu12")


def describe(commit: str | None = None) -> Json:
    """The host, as a JSON value; ``commit`` is for sources outside of a git checkout."""
    memory_kb = _first("/proc/meminfo", r"MemTotal:\s*(\d+)")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or commit_of(library()),
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


def describe_gpus(commit: str | None = None) -> Json:
    """The host and the devices of JAX, which it starts."""
    import jax

    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    smi = _output("nvidia-smi", query, "--format=csv,noheader,nounits")
    first = smi.splitlines()[0].split(", ") if smi else []
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {
        **describe(commit),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "gpu": dict(zip(_GPU_FIELDS, first, strict=False)),
        "platform_version": jax.devices()[0].client.platform_version,
        "nvcc": _nvcc_release(),
        "plugins": {name: installed[name] for name in _PLUGINS if name in installed},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "memory_fraction": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ""),
    }


def library() -> Path:
    """The folder of the jax_smfree that is measured."""
    found = importlib.util.find_spec("jax_smfree")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("no jax_smfree: install it first, `pip install .` in the clone")
    return Path(found.origin).parent


def commit_of(folder: Path) -> str | None:
    """With ``+`` where the tree has changes that are not committed; None outside of a checkout."""
    head = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "-uno")
    return head and head + ("+" if changes else "")


def cuda_tool(name: str) -> str:
    """The path of a program of the CUDA toolkit."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError(f"no {name}: install the CUDA toolkit, or put it on PATH")
    return found


def _first(path: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return found.group(1).strip() if found else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _nvcc_release() -> str | None:
    try:
        text = _output(cuda_tool("nvcc"), "--version")
    except FileNotFoundError:
        return None
    release = re.search(r"release (\S+),", text or "")
    return release.group(1) if release else None
