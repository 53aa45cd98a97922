# SPDX-License-Identifier: Apache-2.0
"""Versions, and what this installation was built for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import jax_smfree
from jax_smfree import _native
from jax_smfree._src import targets
from jax_smfree.doctor.findings import Finding

_PLUGIN = re.compile(r"jax[-_]cuda\d+[-_](plugin|pjrt)")
_MINOR = re.compile(r"(\d+)\.(\d+)")


def installed() -> dict[str, str]:
    """The version of every distribution that Python imports, by its normalised name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.name:
            # The first one on sys.path hides the others.
            found.setdefault(_normalised(distribution.name), distribution.version)
    return found


def bounds() -> dict[str, SpecifierSet]:
    """What this package requires of Python and of the packages that it imports in any case."""
    try:
        metadata = importlib.metadata.metadata("jax_smfree")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return {}
    found = {"python": SpecifierSet(metadata["Requires-Python"] or "")}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[_normalised(requirement.name)] = requirement.specifier
    return found


def versions(packages: dict[str, str]) -> Iterator[Finding]:
    """Python, and the packages that this one needs; JAX and its plugins must be of one version."""
    topic = "software"
    yield Finding(topic, "jax_smfree", jax_smfree.__version__)
    jaxlib = packages.get("jaxlib", "none")
    found = packages | {"python": platform.python_version()}
    required = bounds()
    plugins = sorted(filter(_PLUGIN.fullmatch, packages))
    for name in dict.fromkeys(["python", "jax", "jaxlib", *required, *plugins]):
        version = found.get(name, "none")
        needed = required.get(name, SpecifierSet())
        if version == "none" or not needed.contains(version, prereleases=True):
            cure = f"jax_smfree needs {name}{needed}. "
            cure += "Use another Python." if name == "python" else f"pip install '{name}{needed}'"
            yield Finding(topic, name, version, "problem", cure)
        elif name in ("jax", *plugins) and _minor(version) != _minor(jaxlib):
            cure = f"JAX and its parts must be of one version: pip install '{name}=={jaxlib}'."
            yield Finding(topic, name, version, "problem", cure)
        else:
            yield Finding(topic, name, version)


def kernels(packages: dict[str, str], gpus: int) -> Iterator[Finding]:
    """What the grouped matmul needs on the GPUs of this host."""
    version = packages.get("jax", "")
    if gpus and _minor(version) == ("0", "10"):
        cure = "The grouped matmul's kernels for Hopper need 0.11 or newer: pip install -U jax."
        yield Finding("software", "grouped matmul", f"JAX {version}", "warning", cure)


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


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _minor(version: str) -> tuple[str | None, ...]:
    match = _MINOR.match(version)
    return match.groups() if match else ()
