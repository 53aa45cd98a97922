# SPDX-License-Identifier: Apache-2.0
"""Differentiation of the primitives, so that the overlap turns around.

With the routing fixed, dispatch is linear in the rows and in the numbers that its slots carry, and
combine (without weights) is its transpose. So every half is the transpose of the other operation's
other half:

    dispatch_send_cached^T = combine_recv            combine_recv^T = dispatch_send_cached
    dispatch_recv_cached^T = combine_send            combine_send^T = dispatch_recv_cached

Linear in the leaves that are floats, that is; integers have no tangents, and are not sent for them.
An operation without any of it sends nothing in its tangent, and hands the token's on. What rows
lose by being quantised on the wire counts as nothing (straight-through): tangents and cotangents
are those of rows that arrive as they are, and travel as ``grad_wire`` says themselves.

The token is an operand and a result of all of them, and its cotangent is a token: a transposed
recv sends and returns the cotangent of the token in flight, from which the transposed send
receives. The ties turn around too, hence gradient communication runs under the backward pass of the
compute that the forward communication overlapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_smfree._src import compat
from jax_smfree._src.primitives import (
    ROUTING,
    TRANSPOSE,
    Call,
    combine_recv_p,
    combine_send_p,
    combine_send_weighted_p,
    dispatch_recv_cached_p,
    dispatch_recv_p,
    dispatch_recv_weighted_p,
    dispatch_send_cached_p,
    dispatch_send_p,
    tie_p,
    token_in_flight,
)
from jax_smfree._src.rows import differentiable

TANGENTS: dict[Primitive, Any] = {}
"""How the result of a primitive varies; see `_differentiable`."""


def _is_zero(value: Any) -> bool:
    return type(value) is ad.Zero


def _zeros_of(primals: Sequence[Any]) -> list[Any]:
    return [ad.Zero(jax.typeof(p).to_tangent_aval()) for p in primals]


def _tangent_call(call: Call) -> Call:
    if not call.group.config.differentiable:
        raise ValueError(
            f"jax_smfree: the operation at {call.call_site} is differentiated, but its group was "
            "created with EpConfig(differentiable=False). Create it with differentiable=True."
        )
    return call.tangent()


def _sends(call: Call) -> bool:
    """Whether a tangent of the operation has anything to send."""
    return bool(call.carries_slots or differentiable(call.leaves, call.keep))


def _passed_on(token: Any, longer: int) -> Any:
    """The tangent of a token, past an operation whose tangent sends nothing."""
    if longer < 0:
        return token[:longer]
    return jnp.pad(token, (0, longer)) if longer else token


def _float_tangents(tangents: Sequence[Any], call: Call) -> list[Any]:
    """The tangents of the leaves that are floats; none where rows are kept as they travelled."""
    if not call.keep:
        pairs = zip(tangents, call.leaves, strict=True)
        return [ad.instantiate_zeros(t) for t, leaf in pairs if leaf.is_float]
    if not all(_is_zero(t) for t in tangents):
        raise ValueError(
            f"jax_smfree: the operation at {call.call_site} is differentiated in x, but has "
            "keep=True: its values and scales are what was rounded. Pass "
            "jax.lax.stop_gradient(x), and send gradients in a jax.custom_vjp around the "
            "operation; or take keep=False."
        )
    return []


def _among_all(tangents: Sequence[Any], out: Sequence[Any], call: Call) -> list[Any]:
    """The tangents of the leaves ``out``, of which ``tangents`` are those of floats."""
    if call.keep:
        return _zeros_of(out)
    left = iter(tangents)
    pairs = zip(out, call.leaves, strict=True)
    return [next(left) if leaf.is_float else _zeros_of([o])[0] for o, leaf in pairs]


def _differentiable(primitive: Primitive, tangent: Any) -> None:
    """``tangent(out, primals, tangents, call=...)`` is the tangent of the result ``out``."""

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> Any:
        out = primitive.bind(*primals, call=call)
        return out, tangent(out, primals, tangents, call=call)

    ad.primitive_jvps[primitive] = jvp
    TANGENTS[primitive] = tangent


# ---- linear halves -------------------------------------------------------------------------------
#
# A send is linear in its token, its floats (slots or values) and its leaves, and returns a token; a
# recv is linear in its token, and returns a token, floats and leaves. Without slots the floats are
# of width 0. Between them stands the routing, `num_routing` arrays.


def _linear_send(primitive: Primitive, num_routing: int, transpose_of: Primitive) -> None:
    """Operands: token, floats, *routing, *leaves."""
    leaves_at = 2 + num_routing

    def tangent(
        out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
    ) -> Any:
        token, floats, leaves = tangents[0], tangents[1], tangents[leaves_at:]
        if all(_is_zero(t) for t in (token, floats, *leaves)):
            return _zeros_of(out)
        sent, derived = _float_tangents(leaves, call), _tangent_call(call)
        if not _sends(call):
            return [token if _is_zero(token) else _passed_on(token, call.message_floats)]
        token, floats = map(ad.instantiate_zeros, (token, floats))
        return primitive.bind(token, floats, *primals[2:leaves_at], *sent, call=derived)

    def transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> Any:
        routing = _known(operands[2:leaves_at], call)
        if _is_zero(cotangents[0]):
            return _zero_bars(operands)
        token, floats, *leaves = transpose_of.bind(
            cotangents[0], *routing, call=call.derived(TRANSPOSE)
        )
        return _bars(operands, [token, floats, *[None] * num_routing, *leaves])

    _differentiable(primitive, tangent)
    ad.primitive_transposes[primitive] = transpose


def _linear_recv(primitive: Primitive, num_routing: int, transpose_of: Primitive) -> None:
    """Operands: token, *routing, *add; ``add`` is added to the leaves, or there is none.

    It may vary over further axes, and its cotangents then do: those of the rows are their sums.
    """
    add_at = 1 + num_routing

    def tangent(
        out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
    ) -> Any:
        token, add = tangents[0], tangents[add_at:]
        if _is_zero(token):
            return [*_zeros_of(out[:2]), *(add or _zeros_of(out[2:]))]
        return _received_tangent(
            primitive, token, primals[1:add_at], add, out[0], out[1], out[2:], call
        )

    def transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> Any:
        routing, add = _known(operands[1:add_at], call), operands[add_at:]
        if all(_is_zero(c) for c in cotangents):
            return _zero_bars(operands)
        token, floats, *leaves = map(ad.instantiate_zeros, cotangents)
        sent = (compat.summed_over(v, compat.varying_axes(v) - call.varying) for v in leaves)
        (token,) = transpose_of.bind(token, floats, *routing, *sent, call=call.derived(TRANSPOSE))
        return _bars(operands, [token, *[None] * num_routing, *(leaves if add else [])])

    _differentiable(primitive, tangent)
    ad.primitive_transposes[primitive] = transpose


def _received_tangent(
    recv: Primitive, token_dot: Any, routing: Sequence[Any], add: Sequence[Any],
    token: Any, floats: Any, leaves: Sequence[Any], call: Call,
) -> list[Any]:  # fmt: skip
    """The tangents of ``token, floats, *leaves``, which came out of a recv phase."""
    derived = _tangent_call(call)
    if not _sends(call):
        passed_on = _passed_on(token_dot, -call.message_floats)
        return [passed_on, *_zeros_of([floats, *leaves])]
    if all(_is_zero(t) for t in add):
        add = ()
    token_dot, floats_dot, *dots = recv.bind(
        token_dot, *routing, *map(ad.instantiate_zeros, add), call=derived
    )
    dots = _among_all(dots, leaves, call)
    pairs = zip(dots, leaves, strict=True)
    alike = (d if _is_zero(d) else compat.varying(d, compat.varying_axes(o)) for d, o in pairs)
    return [token_dot, floats_dot, *alike]


def _refuse_transpose(*_: Any, call: Call) -> Any:
    raise ValueError(
        f"jax_smfree: the operation at {call.call_site} is transposed as it stands, expected its "
        "derivative: it is linear where its routing and weights are fixed, and not else. Take "
        "jax.vjp in the place of jax.linear_transpose."
    )


def _known(routing: Sequence[Any], call: Call) -> Sequence[Any]:
    """``routing``, which is not transposed with the operation: another one has made it."""
    if any(map(ad.is_undefined_primal, routing)):
        _refuse_transpose(call=call)
    return routing


def _zero_bars(operands: Sequence[Any]) -> list[Any]:
    return [ad.Zero(o.aval) if ad.is_undefined_primal(o) else None for o in operands]


def _bars(operands: Sequence[Any], bars: Sequence[Any]) -> list[Any]:
    """``bars`` without those of operands that are not linear here."""
    return [b if ad.is_undefined_primal(o) else None for b, o in zip(bars, operands, strict=True)]


_linear_send(dispatch_send_cached_p, 2, combine_recv_p)
_linear_recv(combine_recv_p, 2, dispatch_send_cached_p)
_linear_recv(dispatch_recv_cached_p, 3, combine_send_p)
_linear_send(combine_send_p, 3, dispatch_recv_cached_p)


# ---- the routed dispatch: linear once its routing is known ---------------------------------------


def _dispatch_send_tangent(
    out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
) -> Any:
    token, _, weights, *x = tangents
    if all(_is_zero(t) for t in (token, weights, *x)):
        return _zeros_of(out)
    sent, derived = _float_tangents(x, call), _tangent_call(call)
    token, weights = map(ad.instantiate_zeros, (token, weights))
    routing = out[ROUTING[dispatch_send_p]]
    (token,) = dispatch_send_cached_p.bind(token, weights, *routing, *sent, call=derived)
    return [token, *_zeros_of(out[1:])]


def _dispatch_recv_tangent(
    out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
) -> Any:
    if _is_zero(tangents[0]):
        return _zeros_of(out)
    routing = ROUTING[dispatch_recv_p]
    token, weights, *x = _received_tangent(
        dispatch_recv_cached_p, tangents[0], out[routing][-3:], (),
        out[0], out[1], out[routing.stop :], call,
    )  # fmt: skip
    return [token, weights, *_zeros_of(out[routing]), *x]


_differentiable(dispatch_send_p, _dispatch_send_tangent)
_differentiable(dispatch_recv_p, _dispatch_recv_tangent)


# ---- the weighted combine: bilinear, with its tangent fused for the backward pass ----------------


def _weigh(y: Any, weights: Any) -> Any:
    return (y.astype(jnp.float32) * weights[:, None]).astype(y.dtype)


def _combine_tangent(
    token: Any, weights_dot: Any, weights: Any, rows: Any, recv_counts: Any, relay: Any,
    *leaves: Any, call: Call,
) -> Any:  # fmt: skip
    """Sends the tangent of ``weights * y``, in operations that differentiate themselves.

    ``leaves`` are those of the tangent of y, and then those of y.
    """
    products = [
        (
            y_dot.astype(jnp.float32) * weights[:, None]
            + y.astype(jnp.float32) * weights_dot[:, None]
        ).astype(y.dtype)
        for y_dot, y in zip(*_halves(leaves), strict=True)
    ]
    no_values = compat.varying(jnp.zeros((0,), jnp.float32), call.varying)
    return combine_send_p.bind(token, no_values, rows, recv_counts, relay, *products, call=call)


def _halves(leaves: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    half = len(leaves) // 2
    return leaves[:half], leaves[half:]


def _recv_weighted(
    token: Any, weights: Any, rows: Any, recv_counts: Any, relay: Any, *y: Any, call: Call
) -> Any:
    """The meaning of dispatch_recv_weighted, in operations that differentiate themselves."""
    token, _, *received = dispatch_recv_cached_p.bind(token, rows, recv_counts, relay, call=call)
    pairs = zip(y, received, strict=True)
    values = sum(
        jnp.sum(to.astype(jnp.float32) * row.astype(jnp.float32), axis=1) for to, row in pairs
    )
    return [token, values, *(_weigh(row, weights) for row in received)]


combine_tangent_p = Primitive("smfree_combine_tangent")
combine_tangent_p.multiple_results = True
combine_tangent_p.def_abstract_eval(token_in_flight)
compat.impl(combine_tangent_p)
mlir.register_lowering(combine_tangent_p, mlir.lower_fun(_combine_tangent, multiple_results=True))


def _combine_send_weighted_tangent(
    out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
) -> Any:
    token, weights_dot, _, _, _, *y_dots = tangents
    if all(_is_zero(t) for t in (token, weights_dot, *y_dots)):
        return _zeros_of(out)
    _, weights, *routing_and_y = primals
    derived = _tangent_call(call)
    token, weights_dot, *y_dots = map(ad.instantiate_zeros, (token, weights_dot, *y_dots))
    routing, y = routing_and_y[:3], routing_and_y[3:]
    return combine_tangent_p.bind(token, weights_dot, weights, *routing, *y_dots, *y, call=derived)


def _combine_tangent_transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> Any:
    _, _, weights, *routing = operands[:6]
    _, y = _halves(operands[6:])
    if _is_zero(cotangents[0]):
        return _zero_bars(operands)
    token, values, *leaves = dispatch_recv_weighted_p.bind(
        cotangents[0], weights, *routing, *y, call=call.derived(TRANSPOSE)
    )
    return _bars(operands, [token, values, None, *[None] * 3, *leaves, *[None] * len(y)])


def _differentiable_by(meaning: Any, primitive: Primitive) -> None:
    """A fused primitive is differentiated as its meaning is."""

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> Any:
        _tangent_call(call)
        dots = tuple(ad.instantiate_zeros(t) for t in tangents)
        return jax.jvp(lambda *p: meaning(*p, call=call), tuple(primals), dots)

    def tangent(
        out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
    ) -> Any:
        del out
        return jvp(primals, tangents, call=call)[1]

    ad.primitive_jvps[primitive] = jvp
    TANGENTS[primitive] = tangent


_differentiable(combine_send_weighted_p, _combine_send_weighted_tangent)
for _primitive in (dispatch_send_p, dispatch_recv_p, combine_send_weighted_p):
    ad.primitive_transposes[_primitive] = _refuse_transpose
_differentiable_by(_combine_tangent, combine_tangent_p)
_differentiable_by(_recv_weighted, dispatch_recv_weighted_p)
ad.primitive_transposes[combine_tangent_p] = _combine_tangent_transpose


# ---- tie: only what is not zero is tied, only what is used is kept -------------------------------


def _tie_nonzero(values: Sequence[Any]) -> list[Any]:
    tied = iter(tie_p.bind(*[v for v in values if not _is_zero(v)]))
    return [v if _is_zero(v) else next(tied) for v in values]


def _tie_dce(used: Sequence[bool], eqn: Any) -> Any:
    if not any(used):
        return [False] * len(eqn.invars), None
    kept = [[v for v, u in zip(vs, used, strict=True) if u] for vs in (eqn.invars, eqn.outvars)]
    return list(used), eqn.replace(invars=kept[0], outvars=kept[1])


ad.primitive_jvps[tie_p] = lambda primals, tangents: (tie_p.bind(*primals), _tie_nonzero(tangents))
ad.primitive_transposes[tie_p] = lambda cotangents, *_: _tie_nonzero(cotangents)
batching.primitive_batchers[tie_p] = lambda values, dims: (tie_p.bind(*values), dims)
compat.set_dce_rule(tie_p, _tie_dce)


# ---- vmap ----------------------------------------------------------------------------------------


def batch_of_one(primitive: Primitive) -> Any:
    """A batch of one entry per rank is that entry: ``jax.vmap(..., spmd_axis_name=...)``."""

    def rule(
        axes: frozenset[str], operands: Sequence[Any], dims: Sequence[int | None], *,
        call: Call, **params: Any,
    ) -> Any:  # fmt: skip
        size = max(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)
        if size != 1:
            raise NotImplementedError(
                f"jax_smfree: the operation at {call.call_site} is vmapped over a batch of {size} "
                "entries per rank, expected 1: the number of messages would depend on the batch. "
                "Reshape the batch into the rows, x[B, T, H] to x[B * T, H]; or loop over it with "
                "jax.lax.scan and the token in the carry; or split it over an axis of the mesh, "
                "one entry per shard: jax.vmap(jax.shard_map(...), spmd_axis_name=axis)."
            )
        entries = [
            o if d is None else jax.lax.squeeze(o, [d]) for o, d in zip(operands, dims, strict=True)
        ]
        if call.varying:  # under check_vma=True
            entries = [compat.varying_too(entry, axes) for entry in entries]
            call = dataclasses.replace(call, varying=call.varying | axes)
        out = primitive.bind(*entries, call=call, **params)
        return [jax.lax.expand_dims(o, [0]) for o in out], [0] * len(out)

    return rule


DATA_PRIMITIVES = (
    dispatch_send_p,
    dispatch_recv_p,
    dispatch_send_cached_p,
    dispatch_recv_cached_p,
    dispatch_recv_weighted_p,
    combine_send_p,
    combine_send_weighted_p,
    combine_tangent_p,
    combine_recv_p,
)
for _primitive in DATA_PRIMITIVES:
    compat.set_batch_rule(_primitive, batch_of_one(_primitive))
