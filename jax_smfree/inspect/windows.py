# SPDX-License-Identifier: Apache-2.0
"""What a schedule says: windows between sends and their recvs, the work in them, and orphans."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction that works between a send and its recv.

    Attributes:
      instruction: its name in the compiled program.
      kind: ``"matmul"`` (also a fusion or a loop around one), ``"exchange"`` (a send or recv of
        this library), ``"collective"``, or ``"kernel"`` for all else.
      op_name: the JAX operation that it comes from, with the names of ``jax.named_scope``.
      flops: floating-point operations of its matrix multiplications; ``None`` where the program
        does not say, as for Pallas kernels.
      bytes: size of its operands and results, each counted once.
    """

    instruction: str
    kind: Literal["matmul", "exchange", "collective", "kernel"]
    op_name: str
    flops: int | None = 0
    bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Operation:
    """What names an operation.

    Attributes:
      computation: where it stands in the compiled program: the entry, or the body of a loop.
      operation: ``"dispatch"`` or ``"combine"``; the backward pass of one is the other.
      lane: the lane of its token.
      derivation: 0 as written; else base-4 digits, 1 tangent, 2 transpose, 3 replay.
      call_site: the line of the user's send, e.g. ``model.py:31 in moe``.
    """

    computation: str
    operation: Literal["dispatch", "combine"]
    lane: int
    derivation: int
    call_site: str

    @property
    def is_backward(self) -> bool:
        """Whether it carries a gradient."""
        return 2 in _digits(self.derivation)

    @property
    def is_replay(self) -> bool:
        """Whether ``jax.checkpoint`` runs it again; the gradient of a replay runs once."""
        return "replayed" in self.derived

    @property
    def derived(self) -> str:
        """How it came from what the user wrote, in words: ``"forward"``, ``"gradient"``, …"""
        names = {1: "tangent", 2: "gradient", 3: "replayed"}
        digits = _digits(self.derivation)
        words = [
            names[digit]
            for at, digit in enumerate(digits)
            if not (digit == 1 and 2 in digits) and not (digit == 3 and 2 in digits[at:])
        ]
        return " ".join(words or ["forward"])

    def __str__(self) -> str:
        return f"{self.operation}, lane {self.lane}, {self.derived}, {self.call_site}"


@dataclasses.dataclass(frozen=True)
class Window(Operation):
    """A send, its recv, and what is scheduled between them.

    Attributes:
      send, recv: names of the instructions.
      between: the work in the order of the schedule.
    """

    send: str
    recv: str
    between: tuple[Step, ...]

    @property
    def matmuls(self) -> tuple[Step, ...]:
        """The matrix multiplications among the work."""
        return tuple(s for s in self.between if s.kind == "matmul")

    @property
    def work(self) -> tuple[Step, ...]:
        """What computes, without collectives and other sends and recvs."""
        return tuple(s for s in self.between if s.kind in ("matmul", "kernel"))

    @property
    def flops(self) -> int | None:
        """What the matrix multiplications take; ``None`` if one of them does not say."""
        flops = [step.flops for step in self.work]
        return None if None in flops else sum(filter(None, flops))

    @property
    def bytes(self) -> int:
        """Operands and results of the work."""
        return sum(step.bytes for step in self.work)

    def __str__(self) -> str:
        others = len(self.between) - len(self.matmuls)
        work = f"{len(self.matmuls)} matmuls, {others} other" if self.between else "nothing"
        return f"{super().__str__()} ({self.computation}): {work} between send and recv"


@dataclasses.dataclass(frozen=True)
class Orphan(Operation):
    """A send or recv without its counterpart, which would wait or be waited for in vain.

    Attributes:
      phase: ``"send"`` or ``"recv"``.
      instruction: its name in the compiled program.
      reason: what is wrong with it.
    """

    phase: Literal["send", "recv"]
    instruction: str
    reason: str

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.computation}): {self.phase} {self.reason}"


def _digits(derivation: int) -> list[int]:
    digits: list[int] = []
    while derivation:
        derivation, digit = divmod(derivation, 4)
        digits.insert(0, digit)
    return digits
