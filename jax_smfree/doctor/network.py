# SPDX-License-Identifier: Apache-2.0
"""What connects GPUs of several processes and hosts: NVSHMEM and network adapters."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path

from jax_smfree.doctor.findings import Finding

_WHEELS = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_LIBRARY = "libnvshmem_host.so*"


def nvshmem(packages: dict[str, str]) -> Iterator[Finding]:
    """The wheel, and whether its library loads and tells its version."""
    topic = "network"
    found = [name for name in _WHEELS if name in packages]
    if not found:
        yield Finding(topic, "NVSHMEM", "not installed; not needed within a process")
    for wheel in found:
        try:
            version = library_version(_library_of(wheel))
        except OSError as error:
            cure = f"For GPUs of several processes: pip install --force-reinstall {wheel}."
            yield Finding(topic, wheel, f"{packages[wheel]}: {error}", "warning", cure)
        else:
            yield Finding(topic, wheel, f"{packages[wheel]}, library {version}")


def _library_of(wheel: str) -> Path:
    for file in importlib.metadata.files(wheel) or ():
        if file.match(_LIBRARY):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"no {_LIBRARY} in the wheel")


def library_version(path: Path) -> str:
    """The version that NVSHMEM's vendor interface reports."""
    library = ctypes.CDLL(str(path))
    numbers = [ctypes.c_int() for _ in range(3)]
    library.nvshmemx_vendor_get_version_info(*map(ctypes.byref, numbers))
    return ".".join(str(n.value) for n in numbers)


def settings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """By what NVSHMEM would send, and the variables that it and its transports read."""
    transport = environ.get("NVSHMEM_REMOTE_TRANSPORT", "ibrc, its default")
    yield Finding("network", "NVSHMEM's transport", transport)
    for name in sorted(environ):
        if name.startswith(("NVSHMEM_", "UCX_")):
            yield Finding("network", name, environ[name])


def adapters(root: Path = Path("/sys/class/infiniband")) -> Iterator[Finding]:
    """InfiniBand and RoCE adapters, port by port."""
    ports = sorted(root.glob("*/ports/*"))
    if not ports:
        yield Finding("network", "RDMA adapters", "none")
    for port in ports:
        state, rate, link = (_text(port / name) for name in ("state", "rate", "link_layer"))
        name = f"{port.parents[1].name} port {port.name}"
        if state.endswith("ACTIVE"):
            yield Finding("network", name, f"{link}, {rate}")
        else:
            cure = "Bring the link up (ibstat, rdma link show), or leave this adapter out."
            yield Finding("network", name, f"{link}, {state}", "warning", cure)


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else "unknown"
