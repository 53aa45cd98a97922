# SPDX-License-Identifier: Apache-2.0
"""Versions, and what this installation was built for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator

import jax_smfree
from jax_smfree import _native
from jax_smfree._src import targets
from jax_smfree.doctor.findings import Finding

_PLUGIN = re.compile(r"jax[-_]cuda\d+[-_](plugin|pjrt)")
_MINOR = re.compile(r"(\d+)\.(\d+)")


def installed() -> dict[str, str]:
    """The version of every distribution that Python finds, by its normalised name."""
    return {
        re.sub(r"[-_.]+", "-", d.name).lower(): d.version
        for d in importlib.metadata.distributions()
        if d.name
    }


def versions(packages: dict[str, str]) -> Iterator[Finding]:
    """Python, JAX and its plugins, which must agree with each other."""
    topic = "software"
    yield Finding(topic, "python", platform.python_version())
    yield Finding(topic, "jax_smfree", jax_smfree.__version__)
    jaxlib = packages.get("jaxlib", "none")
    for name in ("jax", "jaxlib", *sorted(filter(_PLUGIN.fullmatch, packages))):
        version = packages.get(name, "none")
        if _minor(version) == _minor(jaxlib):
            yield Finding(topic, name, version)
        else:
            cure = f"JAX and its parts must be of one version: pip install '{name}=={jaxlib}'."
            yield Finding(topic, name, version, "problem", cure)
    if _minor(packages.get("jax", "")) == ("0", "10") and "absl-py" not in packages:
        cure = "The grouped matmul's Pallas kernels need it under JAX 0.10: pip install absl-py."
        yield Finding(topic, "absl-py", "none", "warning", cure)


def build(gpus: int) -> Iterator[Finding]:
    """The platforms whose custom calls are built, and register; ``gpus``: those of this host."""
    yield _registered("cpu", "cpu")
    if _native.has_cuda:
        yield _registered("cuda", "CUDA")
        puts = "built" if _native.puts_on_device else "not built: no NVSHMEM was there"
        yield Finding("build", "puts by the GPU", puts)
    elif gpus:
        cure = (
            "This host has GPUs. Put nvcc on PATH and install from a clone: "
            "pip install . -C cmake.define.SMFREE_CUDA=ON"
        )
        yield Finding("build", "cuda", "not built", "problem", cure)
    else:
        yield Finding(
            "build", "cuda", "not built; programs compile for GPUs and do not run on them"
        )


def _registered(name: str, platform: str) -> Finding:
    calls = f"{len(targets.TARGETS)} custom calls"
    try:
        targets.register(platform)
    except Exception as error:  # whatever jaxlib raises
        cure = f"The build does not fit this jaxlib ({error}). Install jax_smfree again."
        return Finding("build", name, f"{calls}, refused", "problem", cure)
    return Finding("build", name, f"{calls}, registered")


def _minor(version: str) -> tuple[str | None, ...]:
    match = _MINOR.match(version)
    return match.groups() if match else ()
