# SPDX-License-Identifier: Apache-2.0
"""Differentiation of the primitives, so that the overlap turns around.

With the routing fixed, dispatch is linear in the rows and in the numbers that its slots carry, and
combine (without weights) is its transpose. So every half is the transpose of the other operation's
other half:

    dispatch_send_cached^T = combine_recv            combine_recv^T = dispatch_send_cached
    dispatch_recv_cached^T = combine_send            combine_send^T = dispatch_recv_cached

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
    TANGENT,
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
)

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
    return call.derived(TANGENT)


def _differentiable(primitive: Primitive, tangent: Any) -> None:
    """``tangent(out, primals, tangents, call=...)`` is the tangent of the result ``out``."""

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> Any:
        out = primitive.bind(*primals, call=call)
        return out, tangent(out, primals, tangents, call=call)

    ad.primitive_jvps[primitive] = jvp
    TANGENTS[primitive] = tangent


# ---- linear halves -------------------------------------------------------------------------------


def _linear(primitive: Primitive, num_linear: int, transpose_of: Primitive) -> None:
    """Tangent and transpose of a primitive that is linear in the token and some of its operands.

    Operands are (token, *linear, *routing), results (token, *linear). The transpose takes (token,
    *cotangents of the results, *routing) and returns the token's cotangent and the others in
    order. Without slots a half has an operand of width 0 in their place.
    """

    def tangent(
        out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
    ) -> Any:
        linear, routing = tangents[: 1 + num_linear], primals[1 + num_linear :]
        if all(_is_zero(t) for t in linear):
            return _zeros_of(out)
        operands = [*map(ad.instantiate_zeros, linear), *routing]
        return primitive.bind(*operands, call=_tangent_call(call))

    def transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> Any:
        if all(_is_zero(c) for c in cotangents):
            return [ad.Zero(o.aval) if ad.is_undefined_primal(o) else None for o in operands]
        token, *values = [ad.instantiate_zeros(c) for c in cotangents]
        routing = operands[1 + num_linear :]
        token, *values = transpose_of.bind(token, *values, *routing, call=call.derived(TRANSPOSE))
        bars = [token, *values, *[None] * len(routing)]
        return [
            b if ad.is_undefined_primal(o) else None for b, o in zip(bars, operands, strict=True)
        ]

    _differentiable(primitive, tangent)
    ad.primitive_transposes[primitive] = transpose


_linear(dispatch_send_cached_p, 2, combine_recv_p)
_linear(combine_recv_p, 0, dispatch_send_cached_p)
_linear(dispatch_recv_cached_p, 0, combine_send_p)
_linear(combine_send_p, 2, dispatch_recv_cached_p)


# ---- the routed dispatch: linear once its routing is known ---------------------------------------


def _dispatch_send_tangent(
    out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
) -> Any:
    token, x, _, weights = tangents
    if all(_is_zero(t) for t in (token, x, weights)):
        return _zeros_of(out)
    _, places, send_counts = out
    (token_dot,) = dispatch_send_cached_p.bind(
        ad.instantiate_zeros(token),
        ad.instantiate_zeros(x),
        ad.instantiate_zeros(weights),
        places,
        send_counts,
        call=_tangent_call(call),
    )
    return [token_dot, *_zeros_of(out[1:])]


def _dispatch_recv_tangent(
    out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
) -> Any:
    if _is_zero(tangents[0]):
        return _zeros_of(out)
    routing = out[5:]
    tangents_out = dispatch_recv_cached_p.bind(tangents[0], *routing, call=_tangent_call(call))
    return [*tangents_out, *_zeros_of(out[3:])]


_differentiable(dispatch_send_p, _dispatch_send_tangent)
_differentiable(dispatch_recv_p, _dispatch_recv_tangent)


# ---- the weighted combine: bilinear, with its tangent fused for the backward pass ----------------


def _weigh(y: Any, weights: Any) -> Any:
    return (y.astype(jnp.float32) * weights[:, None]).astype(y.dtype)


def _combine_tangent(
    token: Any, y_dot: Any, weights_dot: Any, y: Any, weights: Any, *routing: Any, call: Call
) -> Any:  # fmt: skip
    """Sends the tangent of ``weights * y``, in operations that differentiate themselves."""
    product = (
        y_dot.astype(jnp.float32) * weights[:, None] + y.astype(jnp.float32) * weights_dot[:, None]
    ).astype(y.dtype)
    no_values = compat.varying(jnp.zeros((0,), jnp.float32), call.varying)
    return combine_send_p.bind(token, product, no_values, *routing, call=call)


def _recv_weighted(token: Any, y: Any, weights: Any, *routing: Any, call: Call) -> Any:
    """The meaning of dispatch_recv_weighted, in operations that differentiate themselves."""
    token, received, _ = dispatch_recv_cached_p.bind(token, *routing, call=call)
    values = jnp.sum(y.astype(jnp.float32) * received.astype(jnp.float32), axis=1)
    return [token, _weigh(received, weights), values]


combine_tangent_p = Primitive("smfree_combine_tangent")
combine_tangent_p.multiple_results = True
combine_tangent_p.def_abstract_eval(lambda token, *_, call: [token])
compat.impl(combine_tangent_p)
mlir.register_lowering(combine_tangent_p, mlir.lower_fun(_combine_tangent, multiple_results=True))


def _combine_send_weighted_tangent(
    out: Sequence[Any], primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
) -> Any:
    token, y_dot, weights_dot, *_ = tangents
    if all(_is_zero(t) for t in (token, y_dot, weights_dot)):
        return _zeros_of(out)
    _, y, weights, *routing = primals
    dots = [ad.instantiate_zeros(t) for t in (y_dot, weights_dot)]
    return combine_tangent_p.bind(
        ad.instantiate_zeros(token), *dots, y, weights, *routing,
        call=_tangent_call(call),
    )  # fmt: skip


def _combine_tangent_transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> Any:
    token, y_dot, weights_dot, y, weights, *routing = operands
    (token_bar,) = cotangents
    linear = (token, y_dot, weights_dot)
    if _is_zero(token_bar):
        bars = [ad.Zero(v.aval) if ad.is_undefined_primal(v) else None for v in linear]
    else:
        bars = dispatch_recv_weighted_p.bind(
            token_bar, y, weights, *routing, call=call.derived(TRANSPOSE)
        )
        bars = [b if ad.is_undefined_primal(v) else None for b, v in zip(bars, linear, strict=True)]
    return [*bars, None, None, *[None] * len(routing)]


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
