# SPDX-License-Identifier: Apache-2.0
"""The GPUs, their driver and compiler, and the ceilings of their links."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import _machine
import jax
from _gpu_cases import Case
from _gpu_timing import Json

LARGE_BYTES = 256 * 2**20  # what leaves a GPU where only the rate of the link counts
_QUERY = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _checked(*command: str) -> str:
    """As `_output`, with what the program says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr.strip()}")
    return done.stdout


def cuda_tool(name: str) -> str:
    """The path of a program of the CUDA toolkit."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError(f"no {name}: install the CUDA toolkit, or put it on PATH")
    return found


def _nvcc_release() -> str | None:
    try:
        text = _output(cuda_tool("nvcc"), "--version")
    except FileNotFoundError:
        return None
    release = re.search(r"release (\S+),", text or "")
    return release.group(1) if release else None


def describe(commit: str | None) -> dict[str, Any]:
    """A JSON value. ``commit`` is for sources outside of a git checkout."""
    machine = _machine.describe()
    smi = _output("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    gpu = dict(zip(_QUERY, smi.splitlines()[0].split(", "), strict=True)) if smi else {}
    plugins = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-nccl-cu13", "nvidia-nccl-cu12")
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {
        **machine,
        "commit": commit or machine["commit"],
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "gpu": gpu,
        "platform_version": jax.devices()[0].client.platform_version,
        "nvcc": _nvcc_release(),
        "plugins": {name: installed[name] for name in plugins if name in installed},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "memory_fraction": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ""),
    }


def compiled_and_run(name: str, *args: int) -> Json:
    """What the CUDA program ``name`` of this folder prints."""
    nvcc = cuda_tool("nvcc")
    with tempfile.TemporaryDirectory() as directory:
        program = str(Path(directory, name))
        source = Path(__file__).parent / f"{name}.cu"
        _checked(nvcc, "-O3", "-arch=native", "-o", program, str(source))
        found: Json = json.loads(_checked(program, *map(str, args)))
    return found


def link_ceilings(into: Json, cases: list[Case]) -> None:
    """``link_ceilings.cu`` at the message size of every case, and a large one."""
    ranks = cases[0].shape.ranks
    sizes = {case.shape.name: case.message_bytes for case in cases} if ranks > 1 else {}
    large = LARGE_BYTES // max(1, ranks - 1)
    found = compiled_and_run("link_ceilings", ranks, large, *sizes.values())
    into["local_copy_gb_s"] = found["local_copy"]
    if found["messages"]:
        into["large"], *messages = found["messages"]
        into["by_shape"] = dict(zip(sizes, messages, strict=True))


def egress_gb_s(ceilings: Json, shape_name: str) -> float | None:
    """What all-to-all copies by copy engine reach at a shape's messages, if it was measured."""
    found = ceilings.get("by_shape", {}).get(shape_name)
    return float(found["all_to_all"]) if found else None
