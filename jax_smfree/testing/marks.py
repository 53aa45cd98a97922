# SPDX-License-Identifier: Apache-2.0
"""The ``multihost`` mark of a test."""

import dataclasses
import math

import pytest

from _jax_smfree_pytest import MARK, SIGNATURE, TIMEOUT_INI
from jax_smfree.testing.environment import visible_gpus

SURVIVORS_S = 5.0  # for the other ranks to end a test that has failed on one


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
    timeout_s: float = 0.0  # 0, or None: the ini option

    def __post_init__(self) -> None:
        whole = isinstance(self.processes, int) and isinstance(self.devices_per_process, int)
        if not (
            whole
            and self.processes >= 1
            and self.devices_per_process >= 0
            and self.platform in ("cpu", "cuda")
            and (not self.timeout_s or _is_seconds(self.timeout_s))
        ):
            raise ValueError(
                f"got {self}, expected at least one process, at least one device, the platform "
                "'cpu' or 'cuda', and a positive number of seconds"
            )

    @property
    def shape(self) -> Shape:
        """The processes and devices that it asks for."""
        devices = self.devices_per_process or (2 if self.platform == "cpu" else 1)
        return Shape(self.processes, devices, self.platform)


def multihost(item: pytest.Item) -> Multihost | None:
    """The nearest mark of a test, with the deadline filled in, or ``None``.

    Raises:
      pytest.UsageError: for arguments that the mark does not have, and a wrong ini option.
    """
    mark = item.get_closest_marker(MARK)
    if mark is None:
        return None
    try:
        found = Multihost(*mark.args, **mark.kwargs)
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"{item.nodeid}: {error}. Expected {SIGNATURE}.") from None
    if not found.timeout_s:
        found = dataclasses.replace(found, timeout_s=_default_timeout_s(item.config))
    return found


def _default_timeout_s(config: pytest.Config) -> float:
    text = config.getini(TIMEOUT_INI)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not _is_seconds(seconds):
        raise pytest.UsageError(
            f"got {TIMEOUT_INI} = {text!r}, expected a positive number of seconds."
        )
    return seconds


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


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
