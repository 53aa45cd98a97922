# SPDX-License-Identifier: Apache-2.0
"""`overlap_report`: what hides each movement of a compiled program, and what is wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from jax_smfree.inspect.reader import Reader
from jax_smfree.inspect.windows import Orphan, Window


@dataclasses.dataclass(frozen=True)
class OverlapReport:
    """What a compiled program overlaps; ``str()`` is the report as text.

    Attributes:
      windows: one per send and its recv, with the work between them.
      orphans: sends and recvs that the compiler separated, or cloned; none if all is well.
    """

    windows: tuple[Window, ...]
    orphans: tuple[Orphan, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What takes the overlap away, each with its cure; none if every movement is hidden."""
        return tuple(self._warnings())

    def _warnings(self) -> Iterator[str]:
        for orphan in self.orphans:
            yield (
                f"{orphan}: keep send and recv in one control-flow region, and use each token once."
            )
        for window in self.windows:
            if not window.work:
                yield (
                    f"{window}: the recv waits for all rows. Run work there with "
                    "smfree.overlap(token, fn, *args)."
                )
            elif not window.matmuls:
                yield (
                    f"{window}: only kernels without a matrix multiplication, which end before "
                    "many rows have moved. Give smfree.overlap larger work."
                )
            if any(step.kind == "collective" for step in window.between):
                yield f"{window}: a collective runs there, and shares the links with the rows."

    def __str__(self) -> str:
        lines = [f"{w}{_amount(w)}" for w in self.windows]
        lines += [f"WARNING {text}" for text in self.warnings]
        return "\n".join(lines) or "no sends or recvs"

    def to_json(self) -> dict[str, Any]:
        """A JSON value, with every step."""
        windows = [
            {**dataclasses.asdict(w), "flops": w.flops, "bytes": w.bytes} for w in self.windows
        ]
        orphans = [dataclasses.asdict(orphan) for orphan in self.orphans]
        return {"windows": windows, "orphans": orphans, "warnings": list(self.warnings)}


def overlap_report(program: jax.stages.Compiled | str) -> OverlapReport:
    """Says for each send and recv of a compiled program what is computed between them.

    On a GPU the order that is read here is the order of execution on the compute stream. On a CPU
    it is only the order in which XLA starts what need not wait (docs/overlap.md).

    Args:
      program: ``jax.jit(f).lower(...).compile()``, also for GPUs that are not there, or its
        ``as_text()``.

    Raises:
      ValueError, TypeError: for a program that is not compiled, or is none.

    Example:
      >>> import jax
      >>> import jax_smfree as smfree
      >>> compiled = jax.jit(lambda x: x @ x).lower(jax.numpy.ones((2, 2))).compile()
      >>> print(smfree.overlap_report(compiled))
      no sends or recvs
    """
    reader = Reader("overlap_report", program)
    return OverlapReport(tuple(reader.windows), tuple(reader.orphans))


def overlap(program: jax.stages.Compiled | str) -> list[Window]:
    """The windows of a compiled program: what it runs between each send and its recv.

    Raises:
      ValueError, TypeError: for a program that is not compiled, or is none.

    Example:
      >>> @on_ranks
      ... def step(x, topk_idx):
      ...     d, token = smfree.dispatch(group.token(), x, topk_idx)
      ...     return smfree.combine(token, d, d.x)[0]
      >>> compiled = step.lower(x, topk_idx).compile()
      >>> [window.operation for window in smfree.inspect.overlap(compiled)]
      ['dispatch', 'combine']
    """
    return Reader("overlap", program).windows


def orphans(program: jax.stages.Compiled | str) -> list[Orphan]:
    """Sends that nothing receives, recvs that nothing sends to, recvs that were cloned.

    Raises:
      ValueError, TypeError: for a program that is not compiled, or is none.

    Example:
      >>> compiled = jax.jit(lambda x: x @ x).lower(x).compile()
      >>> smfree.inspect.orphans(compiled)
      []
    """
    return Reader("orphans", program).orphans


def _amount(window: Window) -> str:
    if not window.work:
        return ""
    flops = "unknown FLOPs" if window.flops is None else f"{window.flops / 1e9:.1f} GFLOP"
    return f", {flops}, {window.bytes / 1e6:.1f} MB"
