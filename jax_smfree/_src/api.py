# SPDX-License-Identifier: Apache-2.0
"""The public operations in two phases, and what runs between them; `one_call` has both as one."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

import jax_smfree._src.autodiff
import jax_smfree._src.remat  # noqa: F401  (both register rules of the primitives)
from jax_smfree._src import arguments, checks, compat, group_axis, targets
from jax_smfree._src import primitives as p
from jax_smfree._src.group import EpGroup
from jax_smfree._src.token import DispatchResult, Handle, InFlight, Token


class Default(enum.Enum):
    """The weights of a combine, where the caller names none."""

    FROM_DISPATCH = enum.auto()


def _call(
    token: Token, site: str, num_tokens: int, *, carries_slots: bool, varying: frozenset[str]
) -> p.Call:
    return p.Call(token.group.key, token.lane, site, num_tokens, carries_slots, varying)


def _token_array(token: Token) -> jax.Array:
    """Varying over all axes: replicas may run different branches of a ``cond``."""
    array: jax.Array = compat.varying(token.array, token.group.mesh_axes)
    return array


def _axes_of(array: jax.Array, group: EpGroup, operands: Any) -> frozenset[str]:
    """The axes that rows sent from ``operands`` vary over; the token's ``array`` does over all."""
    given = (compat.varying_axes(v) for v in jax.tree.leaves(operands))
    return compat.varying_axes(array) & frozenset(group_axis.names(group.axis)).union(*given)


def dispatch_send(
    token: Token, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array | None = None
) -> Token:
    """The send phase of a dispatch: packs the rows and hands them to the mover.

    Shapes (per rank): ``x`` [T, H] in the group's dtype, T up to ``max_tokens`` and the same on all
    ranks; ``topk_idx`` [T, K] int32, experts of each row, -1 for none; ``topk_weights`` [T, K]
    float32, ``None`` means ones. A row goes once to each rank, whatever the number of its experts
    there.

    Sharding: inside ``jax.shard_map`` over the group's mesh, manual over all of its axes. What
    comes out of an operation varies over the axes of what went in and the group's, and no others.

    Differentiation: gradients reach ``x`` and ``topk_weights``. In the backward pass this is the
    recv phase of a combine.

    Raises:
      ValueError, TypeError: while tracing, for a token that is in flight, wrong shapes or dtypes,
        a closed group, a call outside of ``shard_map``, a ``shard_map`` over another mesh than the
        group's. Other devices than the group's are refused when the program is lowered.
      jax.errors.JaxRuntimeError: when the result is awaited, on CPUs; and
      SmfreeError: from ``group.check()``, and where the group's ``with`` block is left; both for an
        index outside of [-1, num_experts), the same expert twice in a row, a rank that runs another
        program, a missed deadline. On GPUs the results are NaN until somebody checks.

    Example:
      >>> @on_ranks
      ... def rows_of_experts(x, topk_idx):
      ...     token = smfree.dispatch_send(group.token(), x, topk_idx)
      ...     token, y = smfree.overlap(token, jnp.tanh, x)  # while the rows move
      ...     d, token = smfree.dispatch_recv(token)
      ...     return d.group_sizes
      >>> rows_of_experts(x, topk_idx)  # two experts per rank
      Array([4, 4, 4, 4, 4, 4, 4, 4], dtype=int32)
    """
    name = "dispatch_send"
    group = checks.check_token(name, token, None)
    x = checks.check_rows(name, group, x)
    shape = (x.shape[0], group.config.top_k)
    topk_idx = checks.check_array(name, "topk_idx", topk_idx, shape, jnp.int32, "[T, top_k] = ")
    if topk_weights is None:
        topk_weights = jnp.ones(shape, jnp.float32)
    topk_weights = checks.check_array(
        name, "topk_weights", topk_weights, shape, jnp.float32, "[T, top_k] = "
    )
    site = targets.call_site()
    array, operands = _token_array(token), (x, topk_idx, topk_weights)
    axes = _axes_of(array, group, operands)
    array, places, send_counts = p.dispatch_send_p.bind(
        array,
        *(compat.varying(v, axes) for v in operands),
        call=_call(token, site, x.shape[0], carries_slots=True, varying=axes),
    )
    state = InFlight("dispatch", site, x.shape[0])
    return Token(array, (places, send_counts), group, token.lane, state)


def dispatch_recv(token: Token) -> tuple[DispatchResult, Token]:
    """The recv phase of a dispatch: waits for the rows and groups them by local expert.

    Returns: ``(d, token)``, see `DispatchResult`; the token is ready for the next send.

    Memory: ``d.x`` has ``recv_capacity`` rows, or those of the worst case.

    Differentiation: in the backward pass this is the send phase of a combine.

    Raises: as `dispatch_send`. What exceeds ``recv_capacity`` under ``overflow="error"`` poisons
      ``d.x`` and ``d.weights`` with NaN and raises in ``group.check()``.

    Example:
      >>> @on_ranks
      ... def received(x, topk_idx):
      ...     token = smfree.dispatch_send(group.token(), x, topk_idx)
      ...     d, token = smfree.dispatch_recv(token)
      ...     return d.x
      >>> received(x, topk_idx).shape  # on each of 4 ranks, room for 2 copies of all 16 rows
      (128, 16)
    """
    group = checks.check_token("dispatch_recv", token, "dispatch")
    checks.check_not_received("dispatch_recv", token)
    assert token.state is not None
    tokens, (places, send_counts) = token.state.num_tokens, token.routing
    axes = compat.varying_axes(places)
    array, x, weights, group_sizes, num_dropped, rows, recv_counts, relay = p.dispatch_recv_p.bind(
        _token_array(token),
        call=_call(token, token.state.call_site, tokens, carries_slots=True, varying=axes),
    )
    handle = Handle(places, send_counts, rows, recv_counts, relay, tokens, group.key)
    d = DispatchResult(x, group_sizes, weights, num_dropped, handle)
    return d, Token(array, (), group, token.lane, None)


def combine_send(
    token: Token,
    d: DispatchResult,
    y: jax.Array,
    weights: jax.Array | Literal[Default.FROM_DISPATCH] | None = Default.FROM_DISPATCH,
) -> Token:
    """The send phase of a combine: sums each row's local experts and sends one row back per rank.

    Shapes (per rank): ``y`` [N, H] in the group's dtype, row by row the results for ``d.x``;
    ``weights`` [N] float32, by default ``d.weights``; ``None`` is a plain sum. The products are
    summed in float32 in the order of the slots of ``topk_idx``, and rounded once.

    Sharding: as `dispatch_send`.

    Differentiation: gradients reach ``y`` and ``weights`` (hence ``topk_weights``). In the backward
    pass this is the recv phase of a dispatch.

    Raises: as `dispatch_send`.

    Example:
      >>> @on_ranks
      ... def doubled(x, topk_idx, topk_weights):
      ...     d, token = smfree.dispatch(group.token(), x, topk_idx, topk_weights)
      ...     token = smfree.combine_send(token, d, 2 * d.x)
      ...     out, token = smfree.combine_recv(token)
      ...     return out
      >>> jnp.allclose(doubled(x, topk_idx, topk_weights), 2 * x)  # weights of 1/2, two experts
      Array(True, dtype=bool)
    """
    name = "combine_send"
    group = checks.check_token(name, token, None)
    d = checks.check_result(name, group, d)
    n = d.x.shape[0]
    shape = (n, group.config.hidden)
    y = checks.check_array(name, "y", y, shape, group.config.dtype, "[N, hidden], as d.x, ")
    if isinstance(weights, Default):
        weights = d.weights
    if weights is None:
        send, weights = p.combine_send_p, jnp.zeros((0,), jnp.float32)
    else:
        send = p.combine_send_weighted_p
        weights = checks.check_array(name, "weights", weights, (n,), jnp.float32, "[N] = ")
    array, handle, site = _token_array(token), d.handle, targets.call_site()
    axes = _axes_of(array, group, (y, weights, handle))
    y, weights, *routing = (
        compat.varying(v, axes) for v in (y, weights, handle.rows, handle.recv_counts, handle.relay)
    )
    call = _call(token, site, handle.num_tokens, carries_slots=False, varying=axes)
    (array,) = send.bind(array, y, weights, *routing, call=call)
    of_recv = tuple(compat.varying(v, axes) for v in (handle.places, handle.send_counts))
    return Token(array, of_recv, group, token.lane, InFlight("combine", site, handle.num_tokens))


def combine_recv(token: Token) -> tuple[jax.Array, Token]:
    """The recv phase of a combine: waits for the rows and sums them over the ranks.

    Returns: ``(out, token)``, ``out`` [T, H] in the group's dtype: the sum over the ranks in
      ascending order, in float32, rounded once. In hierarchical mode the ranks of each node are
      summed so, and then the nodes. A row without experts is zero.

    Differentiation: in the backward pass this is the send phase of a dispatch.

    Raises: as `dispatch_send`.

    Example:
      >>> @on_ranks
      ... def summed(x, topk_idx):
      ...     d, token = smfree.dispatch(group.token(), x, topk_idx)
      ...     token = smfree.combine_send(token, d, d.x, weights=None)
      ...     out, token = smfree.combine_recv(token)
      ...     return out
      >>> jnp.allclose(summed(x, topk_idx), x + x)
      Array(True, dtype=bool)
    """
    group = checks.check_token("combine_recv", token, "combine")
    checks.check_not_received("combine_recv", token)
    assert token.state is not None
    site, tokens = token.state.call_site, token.state.num_tokens
    axes = compat.varying_axes(token.routing[0])
    array, out, _ = p.combine_recv_p.bind(
        _token_array(token),
        *token.routing,
        call=_call(token, site, tokens, carries_slots=False, varying=axes),
    )
    return out, Token(array, (), group, token.lane, None)


def tie(token: Token, *values: Any) -> tuple[Any, ...]:
    """Makes all of the results wait for all of the arguments, in the forward and backward pass.

    ``token, x = tie(token, x)``: whatever uses the new ``x`` starts after the operation that
    returned the old token. Values are any pytrees of arrays; nothing is computed.

    Raises:
      TypeError: for what is no token of the library, or no arrays.

    Example:
      >>> @on_ranks
      ... def after_the_send(x, topk_idx):
      ...     token = smfree.dispatch_send(group.token(), x, topk_idx)
      ...     token, x = smfree.tie(token, x)
      ...     y = x @ x.T  # not before the send
      ...     d, token = smfree.dispatch_recv(token)  # may be before y
      ...     return y, d.group_sizes
      >>> y, group_sizes = after_the_send(x, topk_idx)
      >>> y.shape
      (16, 4)
    """
    arguments.instance("tie", "the token", token, Token, "Start with group.token().")
    arguments.tree("tie", "the values", values)
    return _tied(token, *values)


def _tied(*values: Any) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(values)
    result: tuple[Any, ...] = jax.tree.unflatten(tree, p.tie_p.bind(*leaves))
    return result


def overlap(token: Token, fn: Callable[..., Any], *args: Any) -> tuple[Token, Any]:
    """Runs ``fn(*args)`` while the operation in flight moves: after its send, before its recv.

    Both ends are tied to the token, and the ties turn around in the backward pass: there the
    gradient of ``fn`` runs while the gradient's rows move. Everything that ``fn`` computes from
    ``args`` is ordered; what it closes over may be computed earlier.

    Returns: ``(token, fn(*args))``.

    Raises:
      ValueError, TypeError: for a token that is not in flight, what is no function, arguments or
        results that are no pytrees of arrays.

    Example:
      >>> @on_ranks
      ... def under_the_dispatch(x, topk_idx):
      ...     token = smfree.dispatch_send(group.token(), x, topk_idx)
      ...     token, y = smfree.overlap(token, lambda x: x @ x.T, x)
      ...     d, token = smfree.dispatch_recv(token)
      ...     return y, d.group_sizes
      >>> y, group_sizes = under_the_dispatch(x, topk_idx)
      >>> y.shape
      (16, 4)
    """
    if not isinstance(token, Token) or token.state is None:
        raise ValueError(
            "overlap: got no token in flight, expected the one that dispatch_send or combine_send "
            "returned: there is nothing to overlap with."
        )
    arguments.function("overlap", "fn", fn)
    arguments.tree("overlap", "the arguments of fn", args)
    token, *tied = _tied(token, *args)
    out = fn(*tied)
    arguments.tree("overlap", "the results of fn", out)
    token, out = _tied(token, out)
    return token, out
