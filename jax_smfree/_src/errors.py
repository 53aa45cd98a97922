# SPDX-License-Identifier: Apache-2.0
"""The error type of everything that goes wrong at run time."""

from __future__ import annotations

import jax

# What every error of the library's handlers begins with, after XLA's name of its status.
_MARK = "jax_smfree: "


class SmfreeError(RuntimeError):
    """A communication fault: a missed deadline, a lost peer, ranks that disagree, or an overflow.

    Functions of the library raise it: ``EpGroup.create``, ``group.check``. A program that fails
    while it runs is XLA's, and ends in a ``jax.errors.JaxRuntimeError`` with our text where its
    result is awaited (on CPUs; on GPUs the result is NaN). Leaving the ``with`` block of the group
    by one makes a `SmfreeError` of it::

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
    if not isinstance(error, jax.errors.JaxRuntimeError) or _MARK not in str(error):
        return None
    return SmfreeError(str(error)[str(error).index(_MARK) + len(_MARK) :])
