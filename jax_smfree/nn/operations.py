# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine by the library, or by plain ``jax.numpy`` to compare with."""

from typing import Any, Literal

from jax_smfree._src import api, arguments, reference
from jax_smfree._src.token import Token

Implementation = Literal["smfree", "reference"]


def enter(where: str, implementation: Implementation, token: Any) -> tuple[Any, Any]:
    """The module that has the operations, and the token to call them with.

    The reference has tokens of its own, which know what it needs of the given one's group. What is
    wrong with a token of the library its operations say.
    """
    arguments.choice(where, "implementation", implementation, ("smfree", "reference"))
    kinds = (Token,) if implementation == "smfree" else (Token, reference.Token)
    if not isinstance(token, kinds):
        raise TypeError(
            f"{where}: got {arguments.shown(token)} as the token, expected a jax_smfree Token. "
            "Start with group.token(), and pass on the token that the last operation returned."
        )
    if implementation == "smfree":
        return api, token
    group = reference.Group(token.group.axis, token.group.config)
    return reference, reference.Token((), group)


def leave(implementation: Implementation, given: Any, used: Any) -> Any:
    """The token for the caller: the reference leaves the given one as it came."""
    return given if implementation == "reference" else used
