# SPDX-License-Identifier: Apache-2.0
"""The devices that JAX has, and the GPUs that the driver has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jax_smfree.doctor.findings import Finding

# Below it the buffers of an ordinary group (docs/memory.md) do not fit.
_MIN_FREE_SHARE = 0.2
# NVML_P2P_CAPS_INDEX_READ, which nvidia-ml-py defines with a comma too many, as a tuple.
_P2P_READ = 0


def jax_devices(environ: Mapping[str, str], gpus: int) -> Iterator[Finding]:
    """What JAX runs on; ``gpus`` is how many the driver has."""
    topic = "devices"
    try:
        devices = jax.devices()
    except (RuntimeError, ValueError) as error:
        cure = "Install the plugin that JAX_PLATFORMS asks for, or set JAX_PLATFORMS=cpu."
        yield Finding(topic, "jax", str(error).splitlines()[0], "problem", cure)
        return
    kinds = sorted({d.device_kind for d in devices})
    yield Finding(topic, "jax", f"{len(devices)} × {', '.join(kinds)}")
    if gpus and devices[0].platform == "cpu" and "JAX_PLATFORMS" not in environ:
        cure = "JAX does not use the GPUs of this host: pip install 'jax[cuda13]'."
        yield Finding(topic, "GPUs for JAX", "none", "warning", cure)


@contextlib.contextmanager
def nvml() -> Iterator[Any | None]:
    """NVIDIA's management library, or ``None`` where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


class Gpus:
    """The GPUs of this host, through NVML: no CUDA context is made, and no memory taken."""

    def __init__(self, library: Any | None) -> None:
        self._nvml = library
        self._handles: list[Any] = []
        if library:
            count = library.nvmlDeviceGetCount()
            self._handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self._handles)

    def findings(self) -> Iterator[Finding]:
        """Driver, kinds and memory."""
        topic = "GPUs"
        if self._nvml is None:
            yield Finding(topic, "driver", "none")
            return
        yield Finding(topic, "driver", self._nvml.nvmlSystemGetDriverVersion())
        for index, handle in enumerate(self._handles):
            name = self._nvml.nvmlDeviceGetName(handle)
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            except self._nvml.NVMLError as error:  # GPUs that share the host's memory
                yield Finding(topic, f"GPU {index}", f"{name}, memory: {error}")
                continue
            free = f"{name}, {memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
            if memory.free >= _MIN_FREE_SHARE * memory.total:
                yield Finding(topic, f"GPU {index}", free)
            else:
                cure = (
                    "Groups allocate beside XLA's pool. End the other processes on this GPU, or "
                    "start them with XLA_PYTHON_CLIENT_MEM_FRACTION=0.6."
                )
                yield Finding(topic, f"GPU {index}", free, "warning", cure)

    def peer_access(self) -> tuple[tuple[bool, ...], ...]:
        """Whether the GPU of each row can read the memory of each column's."""
        return tuple(tuple(self._reads(a, b) for b in self._handles) for a in self._handles)

    def _reads(self, a: Any, b: Any) -> bool:
        if a is b:
            return True
        assert self._nvml is not None
        try:
            status = self._nvml.nvmlDeviceGetP2PStatus(a, b, _P2P_READ)
        except self._nvml.NVMLError:  # GPUs that know of no peers at all
            return False
        return bool(status == self._nvml.NVML_P2P_STATUS_OK)


def peer_findings(access: tuple[tuple[bool, ...], ...]) -> Iterator[Finding]:
    """Whether all GPUs can be in one group."""
    apart = [f"{i}–{j}" for i, row in enumerate(access) for j, ok in enumerate(row) if not ok]
    if apart:
        cure = "Choose GPUs that reach each other with CUDA_VISIBLE_DEVICES, as the matrix says."
        yield Finding("GPUs", "peer access", f"none between {', '.join(apart)}", "problem", cure)
    elif len(access) > 1:
        yield Finding("GPUs", "peer access", "all GPUs reach each other")
