# SPDX-License-Identifier: Apache-2.0
"""The error type of everything that goes wrong at run time."""

from __future__ import annotations

import re

import jax

# What every error of the library's handlers begins with, after XLA's name of its status.
_MARK = "jax_smfree: "
_OF_A_STATUS = re.compile(rf"[A-Z_]+: {_MARK}")


class SmfreeError(RuntimeError):
    """A communication fault: a missed deadline, a lost peer, ranks that disagree, or an overflow.

    Functions of the library raise it: ``EpGroup.create``, ``group.check``. A program that fails
    while it runs is XLA's, and ends in a ``jax.errors.JaxRuntimeError`` with our text where its
    result is awaited (on CPUs; on GPUs the result is NaN). In a process with one device it may end
    in the call already, which then raises a ``ValueError`` of the same text. Leaving the ``with``
    block of the group by one makes a `SmfreeError` of it::

      try:
          with smfree.EpGroup.create(mesh, config=config) as group:
              jax.block_until_ready(step(...))
              group.check()  # on GPUs, and for an overflow
      except smfree.SmfreeError:
          ...

    Both are a ``RuntimeError``. Misuse that can be seen while tracing raises ``TypeError`` or
    ``ValueError`` instead.
    """


def from_xla(error: BaseException | None) -> SmfreeError | None:
    """The error of this library that XLA has raised as ``error``, if it is one."""
    text = str(error)
    # Compiled programs that JAX has called before raise what ends inside of the call as ValueError.
    of_jax = isinstance(error, jax.errors.JaxRuntimeError) and _MARK in text
    of_a_call = isinstance(error, ValueError) and _OF_A_STATUS.match(text)
    if not (of_jax or of_a_call):
        return None
    return SmfreeError(text[text.index(_MARK) + len(_MARK) :])
