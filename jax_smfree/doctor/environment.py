# SPDX-License-Identifier: Apache-2.0
"""Settings of the environment that are known to break the library, or to take the overlap away."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from jax_smfree.doctor.findings import Finding

_TOPIC = "environment"
# XLA's default pool is 0.75 of a GPU, and what is left must hold the buffers of the groups.
_MAX_POOL = 0.7
_POOL_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_FEWEST_QUEUES = 8
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gpu_settings(environ: Mapping[str, str], gpus: int) -> Iterator[Finding]:
    """Variables that XLA and CUDA read. Nothing is said where there is no GPU."""
    if not gpus:
        return
    yield _pool(environ)
    if environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        cure = "unset CUDA_LAUNCH_BLOCKING: every phase would wait, and nothing would overlap."
        yield Finding(_TOPIC, "CUDA_LAUNCH_BLOCKING", "set", "problem", cure)
    queues = environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if queues and not _number(queues) >= _FEWEST_QUEUES:
        cure = (
            "unset CUDA_DEVICE_MAX_CONNECTIONS: with few hardware queues a copy to a peer can be "
            "held up behind a kernel that has nothing to do with it."
        )
        yield Finding(_TOPIC, "CUDA_DEVICE_MAX_CONNECTIONS", queues, "warning", cure)
    cores = len(os.sched_getaffinity(0))
    if cores <= gpus:
        cure = "Give the process more cores: each GPU's copies are handed over by a thread."
        yield Finding(_TOPIC, "CPU cores", f"{cores} for {gpus} GPUs", "warning", cure)


def _pool(environ: Mapping[str, str]) -> Finding:
    if environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0"):
        return Finding(_TOPIC, "XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    given = [name for name in _POOL_NAMES if environ.get(name)]
    if len(given) > 1:
        cure = f"JAX refuses to start with both. Set one: unset {given[1]}."
        return Finding(_TOPIC, given[0], f"set beside {given[1]}", "problem", cure)
    name = given[0] if given else _POOL_NAMES[1]
    share = environ.get(name)
    if share and _number(share) <= _MAX_POOL:
        return Finding(_TOPIC, name, share)
    cure = f"Groups allocate beside XLA's pool. Leave room for them: export {name}=0.6."
    return Finding(_TOPIC, name, share or "unset, which means 0.75", "warning", cure)


def _number(text: str) -> float:
    """NaN, which passes no comparison, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def cpu_settings(huge_pages: Path = _HUGE_PAGES) -> Iterator[Finding]:
    """What the CPU backend's speed depends on."""
    text = huge_pages.read_text() if huge_pages.is_file() else ""
    if "[never]" in text:
        cure = f"As root: echo madvise > {huge_pages}. Large results take small-page faults."
        yield Finding(_TOPIC, "transparent huge pages", "never", "warning", cure)
