# SPDX-License-Identifier: Apache-2.0
"""The public operations in one call: both phases (native mode), or the second by a hook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import jax

from jax_smfree._src import arguments
from jax_smfree._src.api import (
    Default,
    Weights,
    Wire,
    combine_recv,
    combine_send,
    dispatch_recv,
    dispatch_send,
    overlap,
)
from jax_smfree._src.fp8 import Fp8
from jax_smfree._src.token import DispatchResult, Handle, Token


class RecvHook:
    """The recv phase of an operation in flight, for once: ``hook()`` does it.

    ``hook.overlap(fn, *args)`` returns ``fn(*args)``, computed while the operation moves.
    """

    def __init__(self, token: Token, recv: Callable[[Token], Any]) -> None:
        self._token: Token | None = token
        self._recv = recv

    def _in_flight(self) -> Token:
        if self._token is None:
            raise ValueError("hook: the operation was received already; a hook is called once.")
        return self._token

    def overlap(self, fn: Callable[..., Any], *args: Any) -> Any:
        """``fn(*args)``, tied into the time in which the rows move; see `overlap`."""
        self._token, out = overlap(self._in_flight(), fn, *args)
        return out

    def __call__(self) -> Any:
        """What the recv phase returns."""
        token, self._token = self._in_flight(), None
        return self._recv(token)


def _both(token: Token, recv: Callable[[Token], Any], return_recv_hook: bool) -> Any:
    """The recv phase of what was sent, now or by a hook."""
    return RecvHook(token, recv) if return_recv_hook else recv(token)


@overload
def dispatch(
    token: Token,
    x: Any,
    topk_idx: jax.Array | None = None,
    topk_weights: jax.Array | None = None,
    *,
    routing: Handle | None = None,
    wire: Wire = Default.FROM_CONFIG,
    grad_wire: Wire = Default.FROM_CONFIG,
    keep: bool = False,
    capacity: jax.Array | int | None = None,
    return_recv_hook: Literal[False] = False,
) -> tuple[DispatchResult, Token]: ...
@overload
def dispatch(
    token: Token,
    x: Any,
    topk_idx: jax.Array | None = None,
    topk_weights: jax.Array | None = None,
    *,
    routing: Handle | None = None,
    wire: Wire = Default.FROM_CONFIG,
    grad_wire: Wire = Default.FROM_CONFIG,
    keep: bool = False,
    capacity: jax.Array | int | None = None,
    return_recv_hook: Literal[True],
) -> RecvHook: ...
def dispatch(
    token: Token,
    x: Any,
    topk_idx: jax.Array | None = None,
    topk_weights: jax.Array | None = None,
    *,
    routing: Handle | None = None,
    wire: Wire = Default.FROM_CONFIG,
    grad_wire: Wire = Default.FROM_CONFIG,
    keep: bool = False,
    capacity: jax.Array | int | None = None,
    return_recv_hook: bool = False,
) -> tuple[DispatchResult, Token] | RecvHook:
    """Both phases of a dispatch in one call (native mode), or hook mode.

    The arguments are those of `dispatch_send` and `dispatch_recv`.

    Returns: ``(d, token)`` as `dispatch_recv`; with ``return_recv_hook=True`` a `RecvHook` whose
      call returns that.

    Raises: as `dispatch_send`.

    Example:
      >>> @on_ranks
      ... def by_hook(x, topk_idx):
      ...     hook = smfree.dispatch(group.token(), x, topk_idx, return_recv_hook=True)
      ...     y = hook.overlap(jnp.tanh, x)
      ...     d, token = hook()
      ...     return d.group_sizes
      >>> by_hook(x, topk_idx).sum()
      Array(32, dtype=int32)
    """
    arguments.flag("dispatch", "return_recv_hook", return_recv_hook)
    token = dispatch_send(
        token, x, topk_idx, topk_weights, routing=routing, wire=wire, grad_wire=grad_wire, keep=keep
    )
    recv = functools.partial(dispatch_recv, capacity=capacity)
    result: tuple[DispatchResult, Token] | RecvHook = _both(token, recv, return_recv_hook)
    return result


@overload
def combine(
    token: Token,
    d: DispatchResult,
    y: Any,
    weights: Weights = Default.FROM_DISPATCH,
    *,
    wire: Fp8 | None = None,
    grad_wire: Fp8 | None = None,
    add: Any = None,
    return_recv_hook: Literal[False] = False,
) -> tuple[Any, Token]: ...
@overload
def combine(
    token: Token,
    d: DispatchResult,
    y: Any,
    weights: Weights = Default.FROM_DISPATCH,
    *,
    wire: Fp8 | None = None,
    grad_wire: Fp8 | None = None,
    add: Any = None,
    return_recv_hook: Literal[True],
) -> RecvHook: ...
def combine(
    token: Token,
    d: DispatchResult,
    y: Any,
    weights: Weights = Default.FROM_DISPATCH,
    *,
    wire: Fp8 | None = None,
    grad_wire: Fp8 | None = None,
    add: Any = None,
    return_recv_hook: bool = False,
) -> tuple[Any, Token] | RecvHook:
    """Both phases of a combine in one call (native mode), or hook mode.

    The arguments are those of `combine_send` and `combine_recv`.

    Returns: ``(out, token)`` as `combine_recv`; with ``return_recv_hook=True`` a `RecvHook` whose
      call returns that.

    Raises: as `dispatch_send`.

    Example:
      >>> @on_ranks
      ... def there_and_back(x, topk_idx, topk_weights):
      ...     d, token = smfree.dispatch(group.token(), x, topk_idx, topk_weights)
      ...     out, token = smfree.combine(token, d, d.x)
      ...     return out
      >>> jnp.allclose(there_and_back(x, topk_idx, topk_weights), x)
      Array(True, dtype=bool)
    """
    arguments.flag("combine", "return_recv_hook", return_recv_hook)
    token = combine_send(token, d, y, weights, wire=wire, grad_wire=grad_wire)
    result: tuple[Any, Token] | RecvHook = _both(
        token, functools.partial(combine_recv, add=add), return_recv_hook
    )
    return result
