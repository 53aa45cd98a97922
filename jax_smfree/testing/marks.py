# SPDX-License-Identifier: Apache-2.0
"""The ``multihost`` mark of a test."""

import dataclasses

import pytest

from jax_smfree.testing.environment import visible_gpus

TIMEOUT_INI = "multihost_timeout"
SURVIVORS_S = 5.0  # for the other ranks to end a test that has failed on one
SIGNATURE = "multihost(processes=2, devices_per_process=2, platform='cpu', timeout_s=None)"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a test wants to run on. Tests of the same shape share worker processes."""

    processes: int
    devices_per_process: int
    platform: str

    def __str__(self) -> str:
        return f"{self.processes}x{self.devices_per_process}-{self.platform}"


@dataclasses.dataclass(frozen=True)
class Multihost:
    """The arguments of the mark; see docs/testing.md."""

    processes: int = 2
    devices_per_process: int = 0  # 0: two on the CPU, one GPU
    platform: str = "cpu"
    timeout_s: float = 0.0  # 0: the ini option

    @property
    def shape(self) -> Shape:
        """The processes and devices that it asks for."""
        devices = self.devices_per_process or (2 if self.platform == "cpu" else 1)
        return Shape(self.processes, devices, self.platform)


def multihost(item: pytest.Item) -> Multihost | None:
    """The nearest mark of a test, with the deadline filled in, or ``None``.

    Raises:
      pytest.UsageError: for arguments that the mark does not have.
    """
    mark = item.get_closest_marker("multihost")
    if mark is None:
        return None
    try:
        found = Multihost(*mark.args, **mark.kwargs)
        right = found.processes > 0 and found.devices_per_process >= 0
    except TypeError as error:
        raise pytest.UsageError(f"{item.nodeid}: {error}. Expected {SIGNATURE}.") from None
    if not right or found.platform not in ("cpu", "cuda"):
        raise pytest.UsageError(
            f"{item.nodeid}: got {found}, expected at least one process, at least one device, and "
            "the platform 'cpu' or 'cuda'."
        )
    timeout_s = found.timeout_s or float(item.config.getini(TIMEOUT_INI))
    return dataclasses.replace(found, timeout_s=timeout_s)


def skip_reason(item: pytest.Item, shape: Shape) -> str | None:
    """Why a test is skipped before any process is started for it, or ``None``."""
    # Private, but old and used by many plugins: starting processes only to learn that a test is
    # skipped costs seconds.
    from _pytest.skipping import evaluate_skip_marks

    if (skip := evaluate_skip_marks(item)) is not None:
        return skip.reason or "unconditional skip"
    wanted = shape.processes * shape.devices_per_process
    if shape.platform == "cuda" and len(visible_gpus()) < wanted:
        return f"needs {wanted} GPUs, this host has {len(visible_gpus())}"
    return None
