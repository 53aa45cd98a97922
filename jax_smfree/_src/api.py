# SPDX-License-Identifier: Apache-2.0
"""The public operations in two phases, and what runs between them; `one_call` has both as one."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

import jax_smfree._src.autodiff
import jax_smfree._src.remat  # noqa: F401  (both register rules of the primitives)
from jax_smfree._src import arguments, checks, compat, group_axis, row_checks, targets
from jax_smfree._src import primitives as p
from jax_smfree._src.config import EpConfig
from jax_smfree._src.fp8 import Fp8
from jax_smfree._src.group import EpGroup
from jax_smfree._src.rows import largest_stride, on_wire
from jax_smfree._src.token import DispatchResult, Handle, InFlight, Token


class Default(enum.Enum):
    """What an operation takes where the caller names nothing."""

    FROM_DISPATCH = enum.auto()
    FROM_CONFIG = enum.auto()


Weights = jax.Array | Literal[Default.FROM_DISPATCH] | None
Wire = Fp8 | Literal[Default.FROM_CONFIG] | None


def _call(token: Token, state: InFlight, varying: frozenset[str]) -> p.Call:
    """Static parameters of a send phase, and of its recv phase where rows are dequantised."""
    leaves, wire, grad_wire = state.rows.leaves, state.wire, state.grad_wire
    return p.Call(
        token.group.key, token.lane, state.call_site, state.num_tokens, state.carries_slots,
        varying, leaves=leaves, wire=wire, grad_wire=grad_wire, keep=state.keep,
        row_bytes=largest_stride(leaves, wire, grad_wire, state.keep),
    )  # fmt: skip


def _recv_call(token: Token, state: InFlight, varying: frozenset[str]) -> p.Call:
    call = _call(token, state, varying)
    if not state.keep:
        return call
    return dataclasses.replace(call, leaves=on_wire(call.leaves, call.wire), wire=None)


def _token_array(token: Token) -> jax.Array:
    """Varying over all axes: replicas may run different branches of a ``cond``."""
    array: jax.Array = compat.varying(token.array, token.group.mesh_axes)
    return array


def _axes_of(array: jax.Array, group: EpGroup, operands: Any) -> frozenset[str]:
    """The axes that rows sent from ``operands`` vary over; the token's ``array`` does over all."""
    given = (compat.varying_axes(v) for v in jax.tree.leaves(operands))
    return compat.varying_axes(array) & frozenset(group_axis.names(group.axis)).union(*given)


def _wires(
    name: str, config: EpConfig, wire: Wire, grad_wire: Wire
) -> tuple[Fp8 | None, Fp8 | None]:
    """How rows and their derivatives travel."""
    wire = config.wire if isinstance(wire, Default) else wire
    grad_wire = config.grad_wire if isinstance(grad_wire, Default) else grad_wire
    return (
        row_checks.check_wire(name, "wire", wire),
        row_checks.check_wire(name, "grad_wire", grad_wire),
    )


def dispatch_send(
    token: Token,
    x: Any,
    topk_idx: jax.Array | None = None,
    topk_weights: jax.Array | None = None,
    *,
    routing: Handle | None = None,
    wire: Wire = Default.FROM_CONFIG,
    grad_wire: Wire = Default.FROM_CONFIG,
    keep: bool = False,
) -> Token:
    """The send phase of a dispatch: packs the rows and hands them to the mover.

    Shapes (per rank): ``x`` [T, ...], one row per token, T up to ``max_tokens`` and the same on all
    ranks; ``topk_idx`` [T, K] int32, experts of each row, -1 for none; ``topk_weights`` [T, K]
    float32, ``None`` means ones. A row goes once to each rank, whatever the number of its experts
    there.

    Rows: ``x`` is an array, or a pytree of up to eight arrays whose rows belong together: values
    and their scales, positions, ids. Dtypes: float32, bfloat16, float16, float8_e4m3fn,
    float8_e5m2, int8 to int64, uint8 to uint32, bool. A row takes at most as many bytes on the wire
    as ``EpConfig.hidden`` and ``dtype`` say, each of its arrays rounded up to 16.

    Args:
      routing: the handle of another dispatch, in the place of ``topk_idx``: the rows go where its
        rows went, and are cut and dropped as they were. ``topk_weights=None`` then sends none.
      wire: an `Fp8` quantises the rows that are float32, bfloat16 or float16 while they are packed,
        and gives back their dtype where they arrive. ``None`` sends them as they are. By default
        as ``EpConfig.wire`` says.
      grad_wire: the same for the derivatives, by default as ``EpConfig.grad_wire`` says.
      keep: leaves quantised rows as they are where they arrive, for matmuls in 8 bits: ``d.x`` has
        a `Quantized` in the place of each such array.

    Sharding: inside ``jax.shard_map`` over the group's mesh, manual over all of its axes. What
    comes out of an operation varies over the axes of what went in and the group's, and no others.

    Differentiation: gradients reach the floats in ``x``, and ``topk_weights``. In the backward pass
    this is the recv phase of a combine. Quantisation counts as the identity (straight-through).
    With ``keep=True`` there is no derivative in ``x``: pass ``jax.lax.stop_gradient(x)``.

    Raises:
      ValueError, TypeError: while tracing, for a token that is in flight, wrong shapes or dtypes,
        rows that are too long or are not of whole blocks, a closed group, a call outside of
        ``shard_map``, a ``shard_map`` over another mesh than the group's. Other devices than the
        group's are refused when the program is lowered.
      jax.errors.JaxRuntimeError: when the result is awaited, on CPUs; and
      SmfreeError: from ``group.check()``, and where the group's ``with`` block is left; both for an
        index outside of [-1, num_experts), the same expert twice in a row, a rank that runs another
        program, a missed deadline. On GPUs the results are NaN until somebody checks. For portable
        groups see docs/multihost.md.

    Example:
      >>> @on_ranks
      ... def rows_of_experts(x, topk_idx):
      ...     token = smfree.dispatch_send(group.token(), x, topk_idx)
      ...     token, y = smfree.overlap(token, jnp.tanh, x)  # while the rows move
      ...     d, token = smfree.dispatch_recv(token)
      ...     return d.group_sizes
      >>> rows_of_experts(x, topk_idx)  # two experts per rank
      Array([4, 4, 4, 4, 4, 4, 4, 4], dtype=int32)

      Ids go with their rows, and more rows the same way afterwards:

      >>> @on_ranks
      ... def with_ids(x, ids, topk_idx):
      ...     rows = {"x": x[:, :8], "id": ids}
      ...     d, token = smfree.dispatch(group.token(), rows, topk_idx)
      ...     more, token = smfree.dispatch(token, x[:, 8:], routing=d.handle)
      ...     return d.x["id"], more.x
      >>> ids, more = with_ids(x, jnp.arange(16), topk_idx)
      >>> ids.shape, more.shape
      ((128,), (128, 8))

      Quantised on the wire, in blocks of 32 elements with a scale:

      >>> @on_ranks
      ... def in_8_bits(x, topk_idx):
      ...     wide = jnp.tile(x.astype(jnp.bfloat16), (1, 2))
      ...     how = {"wire": smfree.Fp8(block=32), "keep": True}
      ...     token = smfree.dispatch_send(group.token(), wide, topk_idx, **how)
      ...     d, token = smfree.dispatch_recv(token)
      ...     return d.x
      >>> jax.tree.map(lambda v: (v.shape, v.dtype.name), in_8_bits(x, topk_idx))
      Quantized(values=((128, 32), 'float8_e4m3fn'), scales=((128, 1), 'float32'))
    """
    name = "dispatch_send"
    group = checks.check_token(name, token, None)
    wire, grad_wire = _wires(name, group.config, wire, grad_wire)
    if arguments.flag(name, "keep", keep) and wire is None:
        raise ValueError(
            f"{name}: got keep=True without wire, expected wire=smfree.Fp8(...): what is kept are "
            "values and scales, as they travel."
        )
    rows, leaves = row_checks.check_sent(name, group, x, wire, grad_wire)
    tokens, top_k = leaves[0].shape[0], group.config.top_k
    if (topk_idx is None) == (routing is None):
        got = "neither" if routing is None else "both"
        raise ValueError(f"{name}: got {got} topk_idx and routing, expected one of them.")
    carries_slots = routing is None or topk_weights is not None
    if topk_weights is None:
        topk_weights = jnp.ones((tokens, top_k if carries_slots else 0), jnp.float32)
    else:
        topk_weights = checks.check_array(
            name, "topk_weights", topk_weights, (tokens, top_k), jnp.float32, "[T, top_k] = "
        )
    state = InFlight(
        "dispatch", targets.call_site(), tokens, rows, wire, grad_wire, keep, routing is not None,
        carries_slots,
    )  # fmt: skip
    array = _token_array(token)
    if routing is None:
        topk_idx = checks.check_array(
            name, "topk_idx", topk_idx, (tokens, top_k), jnp.int32, "[T, top_k] = "
        )
        axes = _axes_of(array, group, (topk_idx, topk_weights, leaves))
        operands = (topk_idx, topk_weights, *leaves)
        array, *of_recv = p.dispatch_send_p.bind(
            array, *(compat.varying(v, axes) for v in operands), call=_call(token, state, axes)
        )
    else:
        handle = checks.check_handle(name, group, "routing", routing)
        if tokens != handle.num_tokens:
            raise ValueError(
                f"{name}: got x with {tokens} rows, expected {handle.num_tokens}, as the dispatch "
                "that made the routing."
            )
        axes = _axes_of(array, group, (handle, topk_weights, leaves))
        handle, topk_weights, leaves = jax.tree.map(
            lambda v: compat.varying(v, axes), (handle, topk_weights, leaves)
        )
        (array,) = p.dispatch_send_cached_p.bind(
            array, topk_weights, handle.places, handle.send_counts, *leaves,
            call=_call(token, state, axes),
        )  # fmt: skip
        of_recv = [handle]
    return Token(array, tuple(of_recv), group, token.lane, state)


def dispatch_recv(
    token: Token, *, capacity: jax.Array | int | None = None
) -> tuple[DispatchResult, Token]:
    """The recv phase of a dispatch: waits for the rows and groups them by local expert.

    Returns: ``(d, token)``, see `DispatchResult`; the token is ready for the next send.

    Args:
      capacity: how many rows of ``d.x`` may be filled on this rank, an int32 scalar that may be
        computed; rounded down to a multiple of ``expert_alignment``. In the padded layout it is of
        each local expert. What does not fit is treated as ``EpConfig.overflow`` says. ``None``:
        all. Along a handle rows have their places already.

    Memory: ``d.x`` has ``recv_capacity`` rows, or those of the worst case.

    Differentiation: in the backward pass this is the send phase of a combine.

    Raises: as `dispatch_send`. What exceeds ``wire_capacity``, ``recv_capacity`` or ``capacity``
      under ``overflow="error"`` poisons ``d.x`` and ``d.weights`` with NaN (integers with -1, all
      bits set) and raises in ``group.check()``.

    Example:
      >>> @on_ranks
      ... def received(x, topk_idx):
      ...     token = smfree.dispatch_send(group.token(), x, topk_idx)
      ...     d, token = smfree.dispatch_recv(token)
      ...     return d.x
      >>> received(x, topk_idx).shape  # on each of 4 ranks, room for 2 copies of all 16 rows
      (128, 16)
    """
    name = "dispatch_recv"
    group = checks.check_token(name, token, "dispatch")
    state = token.state
    assert state is not None
    shape = group.config.recv_shape(state.num_tokens, group.num_ranks)
    if state.cached and capacity is not None:
        raise ValueError(
            f"{name}: got capacity for a dispatch along a handle, expected None: its rows have "
            "their places already. Pass it to the dispatch that made the handle."
        )
    axes = compat.varying_axes(jax.tree.leaves(token.routing)[0])
    limit = row_checks.check_capacity(name, capacity, shape[-1], axes)
    checks.check_not_received(name, token)
    call = _recv_call(token, state, axes)
    if state.cached:
        (handle,) = token.routing
        array, weights, *x = p.dispatch_recv_cached_p.bind(
            _token_array(token), handle.rows, handle.recv_counts, handle.relay, call=call
        )
        if not state.carries_slots:
            weights = _ones_on_rows(handle.rows, call.num_rows)
    else:
        array, weights, *routing = p.dispatch_recv_p.bind(
            _token_array(token), compat.varying(limit, axes), call=call
        )
        places, send_counts = token.routing
        group_sizes, of_experts, num_dropped, rows, recv_counts, relay, *x = routing
        handle = Handle(
            places, send_counts, rows, recv_counts, relay, group_sizes, of_experts, num_dropped,
            state.num_tokens, group.key,
        )  # fmt: skip
    rows_of_d = state.rows.restored(x, state.wire if state.keep else None)
    rows_of_d, weights = jax.tree.map(
        lambda v: v.reshape(*shape, *v.shape[1:]), (rows_of_d, weights)
    )
    return DispatchResult(rows_of_d, weights, handle), Token(array, (), group, token.lane, None)


def _ones_on_rows(rows: jax.Array, num_rows: int) -> jax.Array:
    """float32 [N]: one where a received row stands, zero elsewhere."""
    index = jnp.where(rows < 0, num_rows, rows).reshape(-1)
    ones: jax.Array = jnp.zeros((num_rows,), jnp.float32).at[index].set(1, mode="drop")
    return ones


def combine_send(
    token: Token,
    d: DispatchResult,
    y: Any,
    weights: Weights = Default.FROM_DISPATCH,
    *,
    wire: Fp8 | None = None,
    grad_wire: Fp8 | None = None,
) -> Token:
    """The send phase of a combine: sums each row's local experts and sends one row back per rank.

    Shapes (per rank): ``y`` [N, ...], row by row the results for ``d.x``: an array, or a pytree of
    up to eight, of float32, bfloat16, float16, float8_e4m3fn or float8_e5m2; not necessarily as
    wide as ``d.x``, nor of its dtype (a slice of a tensor-parallel result, bfloat16 results of rows
    in 8 bits). ``weights`` [N] float32, by default ``d.weights``; ``None`` is a plain sum. The
    products are summed in float32 in the order of the slots of ``topk_idx``, and rounded once.
    In the padded layout [E / R, C] is in the place of [N]. Rows past ``d.group_sizes`` are not
    read.

    Args:
      wire, grad_wire: as in `dispatch_send`, but off by default. The sums of each rank are
        quantised, and what arrives is summed in float32.

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
    wire, grad_wire = _wires(name, group.config, wire, grad_wire)
    handle = d.handle
    shape = group.config.recv_shape(handle.num_tokens, group.num_ranks)
    rows, leaves = row_checks.check_returned(name, group, y, shape, wire, grad_wire)
    if isinstance(weights, Default):
        weights = d.weights
    if weights is None:
        send, weights = p.combine_send_p, jnp.zeros((0,), jnp.float32)
    else:
        send = p.combine_send_weighted_p
        meaning = f"[{row_checks.NAMES[len(shape)]}] = "
        weights = checks.check_array(name, "weights", weights, shape, jnp.float32, meaning)
        weights = weights.reshape(-1)
    state = InFlight(
        "combine", targets.call_site(), handle.num_tokens, rows, wire, grad_wire, keep=False,
        cached=True, carries_slots=False,
    )  # fmt: skip
    array = _token_array(token)
    axes = _axes_of(array, group, (leaves, weights, handle))
    operands = (weights, handle.rows, handle.recv_counts, handle.relay, *leaves)
    (array,) = send.bind(
        array, *(compat.varying(v, axes) for v in operands), call=_call(token, state, axes)
    )
    of_recv = tuple(compat.varying(v, axes) for v in (handle.places, handle.send_counts))
    return Token(array, of_recv, group, token.lane, state)


def combine_recv(token: Token, *, add: Any = None) -> tuple[Any, Token]:
    """The recv phase of a combine: waits for the rows and sums them over the ranks.

    Returns: ``(out, token)``, ``out`` [T, ...] of the structure and the dtypes of ``y``: the sum
      over the ranks in ascending order, in float32, rounded once. In hierarchical mode the ranks of
      each node are summed so, and then the nodes. A row without experts is zero. Under
      ``overflow="error"`` a row all of whose copies on a rank did not fit is NaN.

    Args:
      add: of the structure, shapes and dtypes of ``out``, and added to the sum before it is rounded
        (the result of a shared expert, a residual). A row without experts is the row of ``add``.

    Differentiation: in the backward pass this is the send phase of a dispatch. The gradient of
      ``add`` is that of ``out``.

    Raises: as `dispatch_send`.

    Example:
      >>> @on_ranks
      ... def summed(x, topk_idx):
      ...     d, token = smfree.dispatch(group.token(), x, topk_idx)
      ...     token = smfree.combine_send(token, d, d.x, weights=None)
      ...     out, token = smfree.combine_recv(token, add=x)
      ...     return out
      >>> jnp.allclose(summed(x, topk_idx), x + x + x)
      Array(True, dtype=bool)
    """
    name = "combine_recv"
    group = checks.check_token(name, token, "combine")
    state = token.state
    assert state is not None
    added = row_checks.check_added(name, add, state.rows, state.num_tokens)
    checks.check_not_received(name, token)
    axes = compat.varying_axes(token.routing[0])
    array, _, *out = p.combine_recv_p.bind(
        _token_array(token),
        *token.routing,
        *(compat.varying(v, axes) for v in added),
        call=_recv_call(token, state, axes),
    )
    return state.rows.restored(out), Token(array, (), group, token.lane, None)


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
