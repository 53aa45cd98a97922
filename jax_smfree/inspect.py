# SPDX-License-Identifier: Apache-2.0
"""What a compiled program overlaps: the work that runs between each send and its recv.

    overlap(compiled)    one `Window` per send and its recv, with the work between them
    orphans(compiled)    halves without their counterpart; an intact program has none
    report(compiled)     both as text

``compiled`` is ``jax.jit(f).lower(...).compile()``, also for GPUs that are not there. On a GPU the
order that is read here is the order of execution on the compute stream. On a CPU it is only the
order in which XLA starts what need not wait, see docs/overlap.md.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import jax

from jax_smfree._src import hlo, targets

_TARGET = re.compile(r"smfree_(dispatch|combine)_(send|recv)")
_MATMUL = re.compile(r"dot|ragged-dot|scaled-dot|convolution")
_MATMUL_TARGET = re.compile(r"cublas|cudnn|matmul|gemm")
# A kernel of Pallas: its own name stands before the primitive at the end of the operation's name.
_PALLAS_MATMUL = re.compile(r"(matmul|outer_product|ragged_dot)\w*/\w+$")
_COLLECTIVE = re.compile(r"(all-|collective-|reduce-scatter|ragged-all-to-all)")
_FREE = frozenset(
    "after-all async-done bitcast constant get-tuple-element opt-barrier parameter partition-id "
    "replica-id tuple".split()
)
# What hands on a token, its first operand, as it is.
_IDENTITY = frozenset(
    "async-done bitcast copy copy-done copy-start opt-barrier reduce-precision reshape".split()
)
# What may stand around a call of this library: a fusion with the slices of its operands and
# results, an asynchronous start.
_WRAPPERS = frozenset(["fusion", "async-start"])


@dataclasses.dataclass(frozen=True)
class Step:
    """One piece of work between a send and its recv.

    Attributes:
      instruction: its name in the compiled program.
      kind: ``"matmul"`` (also a fusion or a loop around one), ``"exchange"`` (a send or recv of
        this library), ``"collective"``, or ``"kernel"`` for all else.
      op_name: the JAX operation that it comes from, with the names of ``jax.named_scope``.
    """

    instruction: str
    kind: Literal["matmul", "exchange", "collective", "kernel"]
    op_name: str


@dataclasses.dataclass(frozen=True)
class _Operation:
    """What names an operation.

    Attributes:
      computation: where it stands in the compiled program: the entry, or the body of a loop.
      operation: ``"dispatch"`` or ``"combine"``; the backward pass of one is the other.
      lane: of its token.
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
        """Whether ``jax.checkpoint`` runs it again."""
        return 3 in _digits(self.derivation)

    def __str__(self) -> str:
        names = {1: "tangent", 2: "gradient", 3: "replayed"}
        words = [names[d] for d in _digits(self.derivation)] or ["forward"]
        if "gradient" in words:
            words = [w for w in words if w != "tangent"]
        return f"{self.operation}, lane {self.lane}, {' '.join(words)}, {self.call_site}"


@dataclasses.dataclass(frozen=True)
class Window(_Operation):
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

    def __str__(self) -> str:
        others = len(self.between) - len(self.matmuls)
        work = f"{len(self.matmuls)} matmuls, {others} other" if self.between else "nothing"
        return f"{super().__str__()} ({self.computation}): {work} between send and recv"


@dataclasses.dataclass(frozen=True)
class Orphan(_Operation):
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


def overlap(program: jax.stages.Compiled | str) -> list[Window]:
    """The windows of a compiled program: what it runs between each send and its recv.

    Raises:
      ValueError: for a program that is not compiled.

    Example:
      >>> for w in smfree.inspect.overlap(jax.jit(step).lower(*args).compile()):  # doctest: +SKIP
      ...     assert w.matmuls, f"nothing hides {w}"
    """
    return _Reader(program).windows


def orphans(program: jax.stages.Compiled | str) -> list[Orphan]:
    """Sends that nothing receives, recvs that nothing sends to, recvs that were cloned.

    Raises:
      ValueError: for a program that is not compiled.
    """
    return _Reader(program).orphans


def report(program: jax.stages.Compiled | str) -> str:
    """`overlap` and `orphans` as text, one line each."""
    reader = _Reader(program)
    lines = [str(w) for w in reader.windows] + [f"ORPHAN {o}" for o in reader.orphans]
    return "\n".join(lines) or "no sends or recvs"


def _digits(derivation: int) -> list[int]:
    digits: list[int] = []
    while derivation:
        derivation, digit = divmod(derivation, 4)
        digits.insert(0, digit)
    return digits


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A token's way leads out of a computation: through its parameter, and tuple indices in it."""

    number: int
    path: tuple[int, ...]


class _Reader:
    """Pairs the sends and recvs of a program by their tokens."""

    def __init__(self, program: jax.stages.Compiled | str) -> None:
        text = program if isinstance(program, str) else program.as_text()
        self._computations = hlo.parse(text or "")
        self._matmul_of: dict[str, hlo.Instruction | None] = {}
        self.windows: list[Window] = []
        self.orphans: list[Orphan] = []
        wrapped = {
            called
            for computation in self._computations.values()
            for instruction in computation
            if instruction.opcode in _WRAPPERS
            for called in instruction.called
        }
        for name, computation in self._computations.items():
            if name not in wrapped:
                self._pair(computation)

    def _pair(self, computation: hlo.Computation) -> None:
        sends: dict[str, hlo.Instruction] = {}
        received_by: dict[str, str] = {}
        position = {instruction.name: n for n, instruction in enumerate(computation)}

        def orphan(name: str, call: hlo.Instruction, reason: str) -> None:
            self.orphans.append(Orphan(*_identity(computation, call), _phase(call), name, reason))

        for instruction in computation:
            name, call = instruction.name, self._exchange(instruction)
            if call is None:
                continue
            if _phase(call) == "send":
                sends[name] = call
                continue
            send = self._sender(computation, instruction, call)
            if send not in sends:
                orphan(name, call, "gets its token from no send of this computation")
            elif send in received_by:
                orphan(name, call, f"is a clone of {received_by[send]}: both receive from {send}")
            else:
                received_by[send] = name
                between = computation.instructions[position[send] + 1 : position[name]]
                steps = tuple(self._step(i) for i in between if i.opcode not in _FREE)
                self.windows.append(Window(*_identity(computation, call), send, name, steps))
        for name, call in sends.items():
            if name not in received_by:
                orphan(name, call, "is never received")

    def _exchange(self, instruction: hlo.Instruction) -> hlo.Instruction | None:
        """The custom call of this library that ``instruction`` is, or wraps."""
        if _TARGET.match(instruction.target):
            return instruction
        if instruction.opcode in _WRAPPERS:
            for called in instruction.called:
                for inner in self._computations[called]:
                    if _TARGET.match(inner.target):
                        return inner
        return None

    def _sender(
        self, computation: hlo.Computation, recv: hlo.Instruction, call: hlo.Instruction
    ) -> str:
        """The instruction that sent what ``recv`` receives; the empty string if there is none."""
        token: str = recv.operands[0]
        path: tuple[int, ...] = ()
        if call is not recv:
            outside = self._follow(self._computations[recv.called[0]], call.operands[0], path)
            if not isinstance(outside, _Parameter):
                return ""
            token, path = recv.operands[outside.number], outside.path
        origin = self._follow(computation, token, path)
        return origin if isinstance(origin, str) else ""

    def _follow(
        self, computation: hlo.Computation, name: str, path: tuple[int, ...]
    ) -> str | _Parameter | None:
        """Follows a token back to an exchange or a parameter of the computation.

        ``path`` holds the tuple indices, innermost last, that lead from ``name`` to the token.
        """
        while True:
            i = computation[name]
            if self._exchange(i):
                return name
            if i.opcode == "parameter":
                return _Parameter(int(i.arguments), path)
            if i.opcode == "get-tuple-element":
                name, path = i.operands[0], (*path, i.index)
            elif i.opcode == "tuple" and path:
                name, path = i.operands[path[-1]], path[:-1]
            elif i.opcode in _IDENTITY:
                name = i.operands[0]
            elif i.opcode in ("fusion", "call"):
                inner = self._computations[i.called[0]]
                end = self._follow(inner, inner.root.name, path)
                if not isinstance(end, _Parameter):
                    return None
                name, path = i.operands[end.number], end.path
            else:
                return None

    def _step(self, i: hlo.Instruction) -> Step:
        if self._exchange(i):
            return Step(i.name, "exchange", i.op_name)
        if matmul := self._matmul(i):
            return Step(i.name, "matmul", matmul.op_name or i.op_name)
        return Step(i.name, "collective" if _COLLECTIVE.match(i.opcode) else "kernel", i.op_name)

    def _matmul(self, instruction: hlo.Instruction) -> hlo.Instruction | None:
        """The first matrix multiplication that ``instruction`` is, or runs."""
        if _MATMUL.fullmatch(instruction.opcode) or _MATMUL_TARGET.search(instruction.target):
            return instruction
        if "mosaic" in instruction.target and _PALLAS_MATMUL.search(instruction.op_name):
            return instruction
        for called in instruction.called:
            if called not in self._matmul_of:
                inner = (self._matmul(i) for i in self._computations[called])
                self._matmul_of[called] = next((i for i in inner if i), None)
            if found := self._matmul_of[called]:
                return found
        return None


def _phase(call: hlo.Instruction) -> Literal["send", "recv"]:
    return "send" if "_send" in call.target else "recv"


def _identity(
    computation: hlo.Computation, call: hlo.Instruction
) -> tuple[str, Literal["dispatch", "combine"], int, int, str]:
    return (
        computation.name,
        "dispatch" if "_dispatch" in call.target else "combine",
        call.attribute("lane"),
        call.attribute("derivation"),
        targets.call_site_name(call.attribute("call_site")),
    )
