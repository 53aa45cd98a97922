# SPDX-License-Identifier: Apache-2.0
"""The JAX primitives: one per phase, each of which lowers to one FFI custom call.

Sizes, per rank: T rows sent, H hidden, K top_k, R ranks, N rows of ``d.x``; S is K when the
operation carries a float for every slot of a row, else 0. See ``token.Handle`` for places,
send_counts, rows, recv_counts and relay. The custom call has one operand more, the second:
``position``, int32[2], the rank and which group along the further mesh axes, as
`group_axis.replicas` numbers them.

=======================  =====================================================================
token                    zeros -> token, the beginning of a sequence of operations
dispatch_send            token, x[T,H], topk_idx[T,K], topk_weights[T,K]
                         -> token, places, send_counts
dispatch_recv            token
                         -> token, x[N,H], weights[N], group_sizes, num_dropped, rows,
                            recv_counts, relay
dispatch_send_cached     token, x[T,H], slots[T,S], places, send_counts -> token
dispatch_recv_cached     token, rows, recv_counts, relay
                         -> token, x[N,H], values[N or 0]
dispatch_recv_weighted   token, y[N,H], weights[N], rows, recv_counts, relay
                         -> token, x[N,H] = weights * received, values[N] = <y, received>
combine_send             token, y[N,H], values[N or 0], rows, recv_counts, relay -> token
combine_send_weighted    token, y[N,H], weights[N], rows, recv_counts, relay -> token
combine_recv             token, places, send_counts -> token, out[T,H], slots[T,S]
=======================  =====================================================================

The cached forms take the routing from a handle. They have no JAX effect, so that ``checkpoint``,
``scan`` and dead code elimination treat them as any primitive; the custom call has a side effect,
so that XLA neither merges, drops nor hoists it. What orders them is the token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from jax_smfree._src import compat, targets
from jax_smfree._src.group_key import GroupKey

# How the operations of a program come from those that the user wrote: an operation of the backward
# pass is the transpose of a tangent. Its digits (base 4) are a part of a message's identity.
TANGENT, TRANSPOSE, REPLAY = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of an operation, the parameter of every primitive.

    Attributes:
      group: the key of the token's group.
      lane, call_site: as in the token.
      num_tokens: T.
      carries_slots: S = K, else 0.
      varying: the mesh axes that the rows vary over, and all that comes out but the token, which
        varies over all of them; none under ``check_vma=False``.
      derivation: base-4 digits TANGENT, TRANSPOSE, REPLAY; 0 for an operation as written.
    """

    group: GroupKey
    lane: int
    call_site: str
    num_tokens: int
    carries_slots: bool
    varying: frozenset[str]
    derivation: int = 0

    def derived(self, *digits: int) -> Call:
        """The call of the operation that differentiation or rematerialisation makes of this.

        Raises:
          ValueError: when the digits no longer fit into a message, from the sixteenth on.
        """
        derivation = self.derivation
        for digit in digits:
            derivation = derivation * 4 + digit
        if derivation >= 2**31:
            raise ValueError(
                f"jax_smfree: the operation at {self.call_site} is differentiated or replayed "
                "more than 15 times over, expected fewer: a message says by 31 bits what it is "
                "derived from. Differentiate the block around it less often, or nest fewer "
                "jax.checkpoint."
            )
        return dataclasses.replace(self, derivation=derivation)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.group.config.num_recv_rows(self.num_tokens, self.group.num_ranks)

    @property
    def slot_width(self) -> int:
        """S."""
        return self.group.config.top_k if self.carries_slots else 0

    def attributes(self) -> dict[str, np.int64]:
        """Plain numbers, the same on all ranks and in every process that runs the program."""
        return {
            "group": np.int64(self.group.group_id),
            "lane": np.int64(self.lane),
            "derivation": np.int64(self.derivation),
            "call_site": np.int64(targets.call_site_id(self.call_site)),
        }


def _results(token: Any, call: Call, *results: tuple[Sequence[int], Any]) -> list[Any]:
    """The token as it came, and arrays of these shapes and dtypes."""
    return [
        token,
        *(compat.aval_like(token, shape, jnp.dtype(d), call.varying) for shape, d in results),
    ]


def _dispatch_send(token: Any, x: Any, idx: Any, weights: Any, *, call: Call) -> Any:
    config, ranks = call.group.config, call.group.num_ranks
    places = (call.num_tokens, min(config.top_k, ranks))
    return _results(token, call, (places, jnp.int32), ((ranks,), jnp.int32))


def _dispatch_recv(token: Any, *, call: Call) -> Any:
    config, ranks, n = call.group.config, call.group.num_ranks, call.num_rows
    return _results(
        token,
        call,
        ((n, config.hidden), config.dtype),
        ((n,), jnp.float32),
        ((config.num_experts // ranks,), jnp.int32),
        ((1,), jnp.int32),
        ((ranks, call.num_tokens, config.top_k), jnp.int32),
        ((ranks,), jnp.int32),
        (call.group.relay_shape(call.num_tokens), jnp.int32),
    )


def _only_token(token: Any, *_: Any, call: Call) -> Any:
    return [token]


def _dispatch_recv_cached(token: Any, *_: Any, call: Call) -> Any:
    config, n = call.group.config, call.num_rows
    values = n if call.carries_slots else 0
    return _results(token, call, ((n, config.hidden), config.dtype), ((values,), jnp.float32))


def _dispatch_recv_weighted(token: Any, *_: Any, call: Call) -> Any:
    config, n = call.group.config, call.num_rows
    return _results(token, call, ((n, config.hidden), config.dtype), ((n,), jnp.float32))


def _combine_recv(token: Any, *_: Any, call: Call) -> Any:
    config, t = call.group.config, call.num_tokens
    return _results(
        token, call, ((t, config.hidden), config.dtype), ((t, call.slot_width), jnp.float32)
    )


def _position(group: GroupKey) -> jax.Array:
    """Varies over all axes of the mesh, so it is none of the operands that are differentiated."""
    replica = jnp.int32(0)
    for axis in group.further_axes:
        size = group.mesh.shape[axis]
        replica = replica * size + jax.lax.axis_index(axis).astype(jnp.int32)
    rank = jax.lax.axis_index(group.axis).astype(jnp.int32)
    return jnp.stack([compat.varying(v, group.mesh_axes) for v in (rank, replica)])


def _barrier(values: Sequence[Any]) -> list[Any]:
    return list(hlo.OptimizationBarrierOp(list(values)).results)


def _custom_call(name: str, ctx: Any, *operands: Any, call: Call) -> list[Any]:
    """The barrier on the results keeps XLA:GPU from fusing a call into the update of a scan's
    residuals, which would clone the call (jax 0.11). Without one on the operands a send may be
    fused with a slice that it reads, which saves a copy.
    """
    rule: Any = jax.ffi.ffi_lowering(f"smfree_{name}", has_side_effect=True)
    return _barrier(rule(ctx, *operands, **call.attributes()))


def _primitive(name: str, abstract_eval: Callable[..., Any]) -> Primitive:
    """A primitive that lowers to the custom call ``smfree_<name>`` on every platform."""
    primitive = Primitive(f"smfree_{name}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract_eval)
    compat.impl(primitive)
    lower_position: Any = mlir.lower_fun(_position, multiple_results=False)

    def lower(ctx: Any, token: Any, *operands: Any, call: Call) -> Any:
        call.group.check_devices(call.call_site, compat.lowering_mesh(ctx))
        token_aval, *avals = ctx.avals_in
        (position,) = lower_position(ctx.replace(avals_in=[]), group=call.group)
        ctx = ctx.replace(avals_in=[token_aval, compat.ShapedArray((2,), jnp.int32), *avals])
        return _custom_call(name, ctx, token, position, *operands, call=call)

    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, lower, platform=platform)
    return primitive


# On the CPU it makes what begins with one token a sequence of its own, in which ranks that disagree
# are found out at once. A GPU's operations are in the sequence of their lane.
token_p = Primitive("smfree_token")
token_p.multiple_results = True
token_p.def_abstract_eval(_only_token)
compat.impl(token_p)
mlir.register_lowering(
    token_p,
    lambda ctx, zeros, *, call: _custom_call("token", ctx, zeros, call=call),
    platform="cpu",
)
mlir.register_lowering(token_p, lambda ctx, zeros, *, call: [zeros], platform="cuda")
dispatch_send_p = _primitive("dispatch_send", _dispatch_send)
dispatch_recv_p = _primitive("dispatch_recv", _dispatch_recv)
dispatch_send_cached_p = _primitive("dispatch_send_cached", _only_token)
dispatch_recv_cached_p = _primitive("dispatch_recv_cached", _dispatch_recv_cached)
dispatch_recv_weighted_p = _primitive("dispatch_recv_weighted", _dispatch_recv_weighted)
combine_send_p = _primitive("combine_send", _only_token)
combine_send_weighted_p = _primitive("combine_send_weighted", _only_token)
combine_recv_p = _primitive("combine_recv", _combine_recv)

RECV_PRIMITIVES = frozenset(
    {dispatch_recv_p, dispatch_recv_cached_p, dispatch_recv_weighted_p, combine_recv_p}
)

tie_p = Primitive("smfree_tie")
tie_p.multiple_results = True
tie_p.def_abstract_eval(lambda *avals: list(avals))
compat.impl(tie_p)
mlir.register_lowering(tie_p, lambda ctx, *values: _barrier(values))
