# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine by the library, or by plain ``jax.numpy`` to compare with."""

from typing import Any, Literal

from jax_smfree._src import api, reference

Implementation = Literal["smfree", "reference"]


def enter(implementation: Implementation, token: Any) -> tuple[Any, Any]:
    """The module that has the operations, and the token to call them with.

    The reference has tokens of its own, which know what it needs of the given one's group.
    """
    if implementation == "smfree":
        return api, token
    if implementation == "reference":
        group = reference.Group(token.group.axis, token.group.config)
        return reference, reference.Token((), group)
    raise ValueError(f"got implementation={implementation!r}, expected 'smfree' or 'reference'.")


def leave(implementation: Implementation, given: Any, used: Any) -> Any:
    """The token for the caller: the reference leaves the given one as it came."""
    return given if implementation == "reference" else used
