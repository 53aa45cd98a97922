# SPDX-License-Identifier: Apache-2.0
"""Reads the text of a compiled program: computations, and their instructions in scheduled order."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
# The result type stands before the opcode and may hold anything but a word before a parenthesis.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(([^)]*)\)?(.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|called_computations|branch_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")

_NUMBERED = re.compile(r'^(\d+) "(.*)"$', re.MULTILINE)
_LOCATION = re.compile(r"\{file_name_id=(\d+) function_name_id=(\d+) line=(\d+) ")


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """The type of an array: ``bf16[8,4]`` has 16 ``bits`` per element and ``shape`` (8, 4)."""

    bits: int
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The size of all elements."""
        return -(-math.prod(self.shape) * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: e.g. ``fusion.3`` and ``fusion``.
      type: type of the result, e.g. ``(f32[6]{0}, bf16[8,4]{1,0})``.
      arguments: what stands between the parentheses.
      attributes: what follows them.
      is_root: whether it is the result of its computation.
    """

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """The instructions whose results it takes."""
        return tuple(_NAME.findall(self.arguments))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs: a fusion's, a loop's body and condition, …"""
        return tuple(n for group in _CALLED.findall(self.attributes) for n in _NAME.findall(group))

    @functools.cached_property
    def arrays(self) -> tuple[ArrayType, ...]:
        """The arrays of its result, which is a tuple if there are several."""
        return tuple(_array_type(*found) for found in _ARRAY.findall(self.type))

    @property
    def target(self) -> str:
        """The target of a custom call, else the empty string."""
        return self._find(r'custom_call_target="([^"]*)"')

    @property
    def op_name(self) -> str:
        """Where it comes from in the JAX program, e.g. ``jit(f)/transpose(jvp())/dot_general``."""
        return self._find(r'op_name="([^"]*)"')

    @property
    def index(self) -> int:
        """Which element a ``get-tuple-element`` takes."""
        return int(self._find(r"\bindex=(\d+)"))

    @property
    def has_index(self) -> bool:
        """Whether it says which element it takes."""
        return self._find(r"\bindex=(\d+)") != ""

    def attribute(self, name: str) -> int:
        """An integer attribute of a custom call to the FFI; 0 when it has none of this name."""
        return int(self._find(rf"\b{name} = (-?\d+) : i64") or 0)

    def dimensions(self, name: str) -> tuple[int, ...]:
        """An attribute like ``lhs_contracting_dims={1}``, or the same in a backend config."""
        listed = self._find(rf"\b{name}=\{{([\d,]*)\}}")
        listed = listed or self._find(rf'"{name.replace("_dims", "_dimensions")}":\[([\d,"]*)\]')
        return tuple(int(n) for n in re.findall(r"\d+", listed))

    @property
    def trip_count(self) -> int | None:
        """How often a ``while`` runs its body, if the compiler knows."""
        found = self._find(r'"known_trip_count":\{"n":"(\d+)"\}')
        return int(found) if found else None

    def _find(self, pattern: str) -> str:
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


class Computation:
    """Instructions in the order in which they run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.instructions: list[Instruction] = []
        self._by_name: dict[str, Instruction] = {}

    def append(self, instruction: Instruction) -> None:
        """Adds the next line."""
        self.instructions.append(instruction)
        self._by_name[instruction.name] = instruction

    def __getitem__(self, name: str) -> Instruction:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    @property
    def root(self) -> Instruction:
        """The result."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])


def _array_type(element: str, dimensions: str) -> ArrayType:
    bits = _BITS.match(element)
    shape = tuple(int(n) for n in dimensions.split(",") if n)
    # "pred" is stored as a byte, and a "token" is nothing.
    return ArrayType(int(bits[1]) if bits else 8 * (element == "pred"), shape)


def source_lines(text: str) -> Iterator[str]:
    """The lines of Python that a program comes from, e.g. ``model.py:31 in moe``.

    From the tables at its head; none where a program has no such tables.

    Raises:
      ValueError: for tables that do not fit together.
    """
    head, _, locations = text.partition("\nFileLocations\n")
    files, _, functions = head.partition("\nFunctionNames\n")
    path_of, function_of = (dict(_NUMBERED.findall(table)) for table in (files, functions))
    for file, function, line in _LOCATION.findall(locations.partition("\n\n")[0]):
        if file not in path_of or function not in function_of:
            raise _damaged(f"location {file}/{function}:{line}")
        name = function_of[function].rpartition(".")[2]  # without what it is defined in
        yield f"{os.path.basename(path_of[file])}:{line} in {name}"


def parse(text: str) -> dict[str, Computation]:
    """The computations of a scheduled program by name, callees first.

    Raises:
      ValueError: when the text is not of a scheduled program, so that its order says nothing, or
        not all of it, or damaged.
    """
    if "is_scheduled=true" not in text.split("\n", 1)[0]:
        raise ValueError(
            "got a program that is not scheduled, expected jax.jit(f).lower(...).compile() or its "
            "as_text(): only the compiler decides what runs between a send and its recv."
        )
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    has_entry = False
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = computations[header[1]] = Computation(header[1])
                has_entry |= line.startswith("ENTRY ")
        elif line.startswith("}"):
            current = None
        elif m := _INSTRUCTION.match(line):
            current.append(Instruction(m[2], m[3], m[4], m[5], m[6], m[1] is not None))
        elif line.strip():
            raise _damaged(f"{line.strip()[:60]!r} in {current.name}")
    if current is not None or not has_entry:
        raise ValueError(
            "got a program whose text ends in the middle, expected all that "
            "compiled.as_text() returns. Write the file again."
        )
    for computation in computations.values():
        _check(computation, computations)
    return computations


def _check(computation: Computation, computations: dict[str, Computation]) -> None:
    """Whoever reads the program may follow every name in it."""
    if not computation.instructions:
        raise _damaged(computation.name)
    for i in computation:
        names_are_there = all(name in computation for name in i.operands) and all(
            name in computations for name in i.called
        )
        is_whole = {
            "parameter": i.arguments.isdecimal(),
            "get-tuple-element": bool(i.operands and i.has_index),
            "fusion": bool(i.called),
            "call": bool(i.called),
        }.get(i.opcode, True)
        if not names_are_there or not is_whole:
            raise _damaged(f"{i.name} in {computation.name}")


def _damaged(where: str) -> ValueError:
    return ValueError(
        f"got a program that is damaged at {where}, expected all that compiled.as_text() returns, "
        "as it is. Write the file again."
    )
