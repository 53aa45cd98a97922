# SPDX-License-Identifier: Apache-2.0
"""Pairs the sends and recvs of a scheduled program by their tokens."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax

from jax_smfree._src import arguments, hlo, targets
from jax_smfree.inspect.windows import Orphan, Step, Window
from jax_smfree.inspect.work import Work, is_free

_TARGET = re.compile(r"smfree_(dispatch|combine)_(send|recv)")
# What hands on a token, its first operand, as it is.
_IDENTITY = frozenset(
    "async-done bitcast copy copy-done copy-start opt-barrier reduce-precision reshape".split()
)
# What may stand around a call of this library: a fusion with the slices of its operands and
# results, an asynchronous start.
_WRAPPERS = frozenset(["fusion", "async-start"])


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A token's way leads out of a computation: through its parameter, and tuple indices in it."""

    number: int
    path: tuple[int, ...]


class Reader:
    """Pairs the sends and recvs of a program by their tokens."""

    def __init__(self, where: str, program: jax.stages.Compiled | str) -> None:
        text = program if isinstance(program, str) else _text_of(where, program)
        self._computations = hlo.parse(text)
        self._call_sites = {targets.call_site_number(s): s for s in hlo.source_lines(text)}
        self._work = Work(self._computations)
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
            self.orphans.append(
                Orphan(*self._identity(computation, call), _phase(call), name, reason)
            )

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
                steps = tuple(self._step(computation, i) for i in between if not is_free(i))
                self.windows.append(Window(*self._identity(computation, call), send, name, steps))
        for name, call in sends.items():
            if name not in received_by:
                orphan(name, call, "is never received")

    def _step(self, computation: hlo.Computation, i: hlo.Instruction) -> Step:
        if self._exchange(i):
            return Step(i.name, "exchange", i.op_name)
        return self._work.step(computation, i)

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

    def _identity(
        self, computation: hlo.Computation, call: hlo.Instruction
    ) -> tuple[str, Literal["dispatch", "combine"], int, int, str]:
        number = call.attribute("call_site")
        return (
            computation.name,
            "dispatch" if "_dispatch" in call.target else "combine",
            call.attribute("lane"),
            call.attribute("derivation"),
            self._call_sites.get(number) or targets.call_site_name(number),
        )


def _text_of(where: str, program: Any) -> str:
    if not isinstance(program, jax.stages.Compiled):
        raise TypeError(
            f"{where}: got {arguments.shown(program)} as the program, expected "
            "jax.jit(f).lower(...).compile(), or its as_text()."
        )
    return program.as_text() or ""


def _phase(call: hlo.Instruction) -> Literal["send", "recv"]:
    return "send" if "_send" in call.target else "recv"
