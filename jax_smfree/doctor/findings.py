# SPDX-License-Identifier: Apache-2.0
"""What `jax_smfree.doctor` has to say."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fact about this machine or installation.

    Attributes:
      topic: what it belongs to, e.g. ``"GPUs"``.
      name: what was looked at.
      value: what was found.
      status: ``"warning"`` for what costs speed or breaks larger programs; ``"problem"`` for what
        makes the library fail here.
      cure: what to do about it; given whenever the status is not ``"ok"``.
    """

    topic: str
    name: str
    value: str
    status: Status = "ok"
    cure: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All findings.

    Attributes:
      findings: in the order in which they are to be read.
      peer_access: for each GPU, whether it can read each GPU's memory; empty without GPUs.
    """

    findings: tuple[Finding, ...]
    peer_access: tuple[tuple[bool, ...], ...] = ()

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What makes the library fail here."""
        return tuple(f for f in self.findings if f.status == "problem")

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {"ok": not self.problems, **dataclasses.asdict(self)}
