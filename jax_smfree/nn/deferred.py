# SPDX-License-Identifier: Apache-2.0
"""Gradients of the experts' parameters, computed while those of the rows return to their owners.

A matmul of the experts, y = x @ w, varies with the rows and with the parameters:

    y_dot = x_dot @ w + x @ w_dot

The second product needs nothing of what the tangents' dispatch brings, so it is computed while that
is in flight, by `api.overlap`. The transpose turns the order around: the gradients of the rows are
computed and sent, then come those of the parameters, and then what was sent is received.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad

from jax_smfree._src import api, compat
from jax_smfree._src.token import DispatchResult, Token
from jax_smfree.nn.experts import Experts, Linear, around_matmuls

# (d, params, change) -> y: ``change(experts)`` of a rank, or its experts where ``change`` is None.
Change = Callable[[Experts], Experts]
Compute = Callable[[DispatchResult, Any, Change | None], Array]
Received = tuple[DispatchResult, Token, Array]


def recv(token: Token, compute: Compute, params: Any) -> Received:
    """``dispatch_recv``, and the experts on what came: ``(d, token, y)``."""

    def received(token: Token, params: Any, change: Change | None = None) -> Received:
        d, token = api.dispatch_recv(token)
        return d, token, compute(d, params, change)

    # What replays it as a whole would send the rows in one derivation and receive them in another.
    if not token.group.config.differentiable or compat.replays_whole_functions():
        return received(token, params)

    def of_matmuls(token: Token, params: Any) -> list[Array]:
        results: list[Array] = []
        received(token, params, _recording(results))
        return results

    traced = jax.make_jaxpr(of_matmuls)(token, params)
    if any(isinstance(value, jax.core.Tracer) for value in traced.consts):
        return received(token, params)  # a custom_jvp differentiates nothing but its arguments

    def jvp(primals: tuple[Token, Any], tangents: tuple[Any, Any]) -> tuple[Received, Any]:
        (token, params), (token_dot, params_dot) = primals, tangents
        # Where rows or parameters do not vary, there is nothing to put in order.
        if _is_zero(token_dot.array) or all(map(_is_zero, jax.tree.leaves(params_dot))):
            return _jvp(received, primals, tangents)

        def by_token(array: Array) -> tuple[DispatchResult, Token]:
            return api.dispatch_recv(dataclasses.replace(token, array=array))

        def by_rows(x: Array, weights: Array, taps: list[Array]) -> tuple[Array, list[Any]]:
            operands: list[Any] = []
            change = _tapped(iter(taps), operands)
            return compute(d.replace(x=x, weights=weights), params, change), operands

        def by_params(params: Any) -> list[Array]:
            results: list[Array] = []
            compute(d, params, _repeated(iter(operands), results))
            return results

        def of_params(dots: list[Array]) -> list[Array]:
            left = iter(dots)
            dots = jax.tree.map(lambda dot: dot if _is_zero(dot) else next(left), params_dot)
            tangents: list[Array] = _jvp(by_params, (params,), (dots,))[1]
            return tangents

        (d, ready), recv_tangent = jax.linearize(by_token, token.array)
        taps = [ad.instantiate_zeros(ad.Zero(aval)) for aval in traced.out_avals]
        y, experts_tangent, operands = jax.linearize(by_rows, d.x, d.weights, taps, has_aux=True)
        moving = dataclasses.replace(token, array=token_dot.array, routing=())
        dots = [dot for dot in jax.tree.leaves(params_dot) if not _is_zero(dot)]
        moving, taps_dot = api.overlap(moving, of_params, dots)
        d_dot, ready_dot = recv_tangent(moving.array)
        y_dot = experts_tangent(d_dot.x, d_dot.weights, taps_dot)
        return (d, ready, y), (d_dot, ready_dot, y_dot)

    ordered = jax.custom_jvp(lambda token, params: received(token, params))
    ordered.defjvp(jvp, symbolic_zeros=True)
    result: Received = ordered(token, params)
    return result


def _recording(results: list[Array]) -> Change:
    """Appends what the matmuls return to ``results``."""

    def around(linear: Linear) -> Linear:
        def recorded(*args: Any) -> list[Array]:
            ys = linear(*args)
            results.extend(ys)
            return [jax.lax.stop_gradient(y) for y in ys]

        return recorded

    return functools.partial(around_matmuls, around=around)


def _repeated(operands: Iterator[Any], results: list[Array]) -> Change:
    """The matmuls of ``operands``, as `_recording`, and nothing that is between them."""

    def around(linear: Linear) -> Linear:
        def repeated(x: Array, params: Any, weights: Array | None = None) -> list[Array]:
            x, weights = next(operands)
            results.extend(linear(x, params, weights))
            return results[-len(params) :]

        return repeated

    return functools.partial(around_matmuls, around=around, activation=lambda *ys: ys[-1])


def _tapped(taps: Iterator[Array], operands: list[Any]) -> Change:
    """Results vary with a tap each; what they are computed of is appended to ``operands``."""

    def around(linear: Linear) -> Linear:
        def tapped(x: Array, params: Any, weights: Array | None = None) -> list[Array]:
            operands.append((x, weights))
            return [_plus_tangent(y, next(taps)) for y in linear(x, params, weights)]

        return tapped

    return functools.partial(around_matmuls, around=around)


@jax.custom_jvp
def _plus_tangent(y: Array, of: Array) -> Array:
    """``y``, which varies as ``of`` does, too."""
    del of
    return y


_plus_tangent.defjvps(lambda dot, out, y, of: dot, lambda dot, out, y, of: dot)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _jvp(function: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """`jax.jvp`, where some of the tangents are a `SymbolicZero`."""
    values, tree = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents)
    varies = [not _is_zero(dot) for dot in dots]

    def of_varying(*given: Array) -> Any:
        left = iter(given)
        pairs = zip(values, varies, strict=True)
        return function(*jax.tree.unflatten(tree, [next(left) if v else p for p, v in pairs]))

    chosen, chosen_dots = (
        tuple(a for a, v in zip(each, varies, strict=True) if v) for each in (values, dots)
    )
    out: tuple[Any, Any] = jax.jvp(of_varying, chosen, chosen_dots)
    return out
