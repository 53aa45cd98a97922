# SPDX-License-Identifier: Apache-2.0
"""What kind of work an instruction is, and how much."""

from __future__ import annotations

import math
import re

from jax_smfree._src import hlo
from jax_smfree.inspect.windows import Step

_MATMUL = re.compile(r"dot|ragged-dot|scaled-dot|convolution")
_MATMUL_TARGET = re.compile(r"cublas|cudnn|matmul|gemm")
# A kernel of Pallas: its own name stands before the primitive at the end of the operation's name.
_PALLAS_MATMUL = re.compile(r"(matmul|outer_product|ragged_dot)\w*/\w+$")
_COLLECTIVE = re.compile(r"(all-|collective-|reduce-scatter|ragged-all-to-all)")
_FREE = frozenset(
    "after-all async-done bitcast constant get-tuple-element opt-barrier parameter partition-id "
    "replica-id tuple".split()
)


class Work:
    """The instructions of a program as work."""

    def __init__(self, computations: dict[str, hlo.Computation]) -> None:
        self._computations = computations
        self._matmul_of: dict[str, hlo.Instruction | None] = {}
        self._flops_of: dict[str, int | None] = {}

    def step(self, computation: hlo.Computation, i: hlo.Instruction) -> Step:
        """``i``, which is no send or recv of this library, and is not free."""
        values = (i, *(computation[name] for name in i.operands))
        moved = sum(array.bytes for value in values for array in value.arrays)
        if matmul := self._matmul(i):
            op_name = matmul.op_name or i.op_name
            return Step(i.name, "matmul", op_name, self._flops(computation, i), moved)
        if _COLLECTIVE.match(i.opcode):
            return Step(i.name, "collective", i.op_name, 0, moved)
        return Step(i.name, "kernel", i.op_name, 0, moved)

    def _matmul(self, instruction: hlo.Instruction) -> hlo.Instruction | None:
        """The first matrix multiplication that ``instruction`` is, or runs."""
        if _is_matmul(instruction):
            return instruction
        for called in instruction.called:
            if called not in self._matmul_of:
                inner = (self._matmul(i) for i in self._computations[called])
                self._matmul_of[called] = next((i for i in inner if i), None)
            if found := self._matmul_of[called]:
                return found
        return None

    def _flops(self, computation: hlo.Computation, i: hlo.Instruction) -> int | None:
        """What the matrix multiplications take that ``i`` is, or runs in its longest branch."""
        if _is_matmul(i):
            return _matmul_flops(computation, i)
        inside = [self._flops_in(called) for called in i.called]
        if None in inside:
            return None
        known = [flops for flops in inside if flops is not None]
        if i.opcode == "conditional":
            return max(known)
        if i.opcode == "while" and any(known):
            return sum(known) * i.trip_count if i.trip_count else None
        return sum(known)

    def _flops_in(self, name: str) -> int | None:
        if name not in self._flops_of:
            computation = self._computations[name]
            flops = [self._flops(computation, i) for i in computation]
            self._flops_of[name] = None if None in flops else sum(filter(None, flops))
        return self._flops_of[name]


def is_free(i: hlo.Instruction) -> bool:
    """Whether ``i`` costs nothing when the program runs."""
    return i.opcode in _FREE


def _is_matmul(i: hlo.Instruction) -> bool:
    if _MATMUL.fullmatch(i.opcode) or _MATMUL_TARGET.search(i.target):
        return True
    return "mosaic" in i.target and _PALLAS_MATMUL.search(i.op_name) is not None


def _matmul_flops(computation: hlo.Computation, i: hlo.Instruction) -> int | None:
    """Twice the elements of the result times the length of what is summed over."""
    contracted = i.dimensions("lhs_contracting_dims")
    if not contracted or not i.operands or not i.arrays:
        return None
    (lhs, *_), result = computation[i.operands[0]].arrays, i.arrays[0]
    flops = 2 * math.prod(result.shape) * math.prod(lhs.shape[n] for n in contracted)
    if set(i.dimensions("lhs_ragged_dims")) & set(contracted):
        flops //= result.shape[0]  # each row belongs to one group only
    return flops
