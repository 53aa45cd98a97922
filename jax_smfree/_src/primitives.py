# SPDX-License-Identifier: Apache-2.0
"""The JAX primitives: one per phase, each of which lowers to one FFI custom call.

Sizes, per rank: T rows sent, E experts, K top_k, R ranks, B rows kept of those received, N rows of
``d.x``; S is K when the operation carries a float for every slot of a row, else 0. ``*x[T]`` stands
for the leaves of rows, arrays [T, width] of any widths and dtypes; there may be none of them. See
``token.Handle`` for places, send_counts, rows, recv_counts and relay. The custom call has one
operand more, the second: ``position``, int32[2], the rank and which group along the further mesh
axes, as `group_axis.replicas` numbers them.

=======================  =====================================================================
token                    zeros -> token, the beginning of a sequence of operations
dispatch_send            token, topk_idx[T,K], topk_weights[T,K], *x[T]
                         -> token, places, send_counts
dispatch_recv            token, capacity[1]
                         -> token, weights[N], group_sizes, num_rows, num_dropped, rows,
                            recv_counts, relay, *x[N]
dispatch_send_cached     token, slots[T,S], places, send_counts, *x[T] -> token
dispatch_recv_cached     token, rows, recv_counts, relay -> token, values[N or 0], *x[N]
dispatch_recv_weighted   token, weights[N], rows, recv_counts, relay, *y[N]
                         -> token, values[N] = <y, received>, *x[N] = weights * received
combine_send             token, values[N or 0], rows, recv_counts, relay, *y[N] -> token
combine_send_weighted    token, weights[N], rows, recv_counts, relay, *y[N] -> token
combine_recv             token, places, send_counts, *add[T] -> token, slots[T,S], *out[T]
=======================  =====================================================================

``add`` is of the leaves of ``out``, or there is none. The cached forms take the routing from a
handle. They have no JAX effect, so that ``checkpoint``,
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

from jax_smfree._src import compat, portable, rows, targets
from jax_smfree._src.fp8 import Fp8
from jax_smfree._src.group_key import GroupKey
from jax_smfree._src.rows import Leaf

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
      leaves: of the rows, as the program has them.
      wire, grad_wire: how rows travel, and those of what differentiation makes of the operation.
      keep: whether they are left as they travelled, so that there is nothing to differentiate.
      row_bytes: of a row in the messages of a portable group: a token in flight has one size, in
        the operation and in what differentiation makes of it.
    """

    group: GroupKey
    lane: int
    call_site: str
    num_tokens: int
    carries_slots: bool
    varying: frozenset[str]
    derivation: int = 0
    leaves: tuple[Leaf, ...] = ()
    wire: Fp8 | None = None
    grad_wire: Fp8 | None = None
    keep: bool = False
    row_bytes: int = 0

    def tangent(self) -> Call:
        """The call of its tangent."""
        leaves = rows.differentiable(self.leaves, self.keep)
        row_bytes, most = rows.stride(leaves, self.grad_wire), self.group.row_bytes
        if row_bytes > most:
            raise ValueError(
                f"jax_smfree: the operation at {self.call_site} is differentiated, but its "
                f"gradients take {row_bytes} bytes for each row on the wire, expected at most "
                f"{most}, as EpConfig.hidden and dtype say. Raise hidden, or set grad_wire."
            )
        call = self.derived(TANGENT)
        return dataclasses.replace(call, leaves=leaves, wire=self.grad_wire, keep=False)

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
    def num_wire_rows(self) -> int:
        """B."""
        return self.group.config.num_wire_rows(self.num_tokens, self.group.num_ranks)

    @property
    def slot_width(self) -> int:
        """S."""
        return self.group.config.top_k if self.carries_slots else 0

    @property
    def message_floats(self) -> int:
        """How many floats longer the token is in flight."""
        return self.group.message_floats(self.num_tokens, self.carries_slots, self.row_bytes)

    def attributes(self) -> dict[str, np.int64]:
        """Plain numbers, the same on all ranks and in every process that runs the program."""
        return {
            "group": np.int64(self.group.group_id),
            "lane": np.int64(self.lane),
            "derivation": np.int64(self.derivation),
            "call_site": np.int64(targets.call_site_id(self.call_site)),
            "tokens": np.int64(self.num_tokens),
            "wire_values": np.int64(self.wire.bits if self.wire else 0),
            "wire_block": np.int64(self.wire.block if self.wire else 0),
            "wire_power_of_two": np.int64(self.wire.power_of_two if self.wire else 0),
        }


_Results = tuple[Sequence[int], Any]  # shape and dtype


def _sent(token: Any, call: Call, *results: _Results) -> list[Any]:
    """The token in flight, and arrays of these shapes and dtypes."""
    return _results(token, call, call.message_floats, results)


def _received(token: Any, call: Call, *results: _Results) -> list[Any]:
    """The token ready again, and arrays of these shapes and dtypes."""
    return _results(token, call, -call.message_floats, results)


def _results(token: Any, call: Call, more: int, results: Sequence[_Results]) -> list[Any]:
    return [
        token.update(shape=(token.shape[0] + more,)),
        *(compat.aval_like(token, shape, jnp.dtype(d), call.varying) for shape, d in results),
    ]


def _leaves(num_rows: int, call: Call) -> list[_Results]:
    return [((num_rows, leaf.width), leaf.dtype) for leaf in call.leaves]


def _dispatch_send(token: Any, *_: Any, call: Call) -> Any:
    config, ranks = call.group.config, call.group.num_ranks
    places = (call.num_tokens, min(config.top_k, ranks))
    return _sent(token, call, (places, jnp.int32), ((ranks,), jnp.int32))


def _dispatch_recv(token: Any, *_: Any, call: Call) -> Any:
    config, ranks, n = call.group.config, call.group.num_ranks, call.num_rows
    of_experts = (config.num_experts // ranks,)
    return _received(
        token,
        call,
        ((n,), jnp.float32),
        (of_experts, jnp.int32),
        (of_experts, jnp.int32),
        ((1,), jnp.int32),
        ((call.num_wire_rows, config.top_k), jnp.int32),
        ((ranks,), jnp.int32),
        (call.group.relay_shape(call.num_tokens), jnp.int32),
        *_leaves(n, call),
    )


def token_in_flight(token: Any, *_: Any, call: Call) -> Any:
    return _sent(token, call)


def _dispatch_recv_cached(token: Any, *_: Any, call: Call) -> Any:
    n = call.num_rows
    values = n if call.carries_slots else 0
    return _received(token, call, ((values,), jnp.float32), *_leaves(n, call))


def _dispatch_recv_weighted(token: Any, *_: Any, call: Call) -> Any:
    n = call.num_rows
    return _received(token, call, ((n,), jnp.float32), *_leaves(n, call))


def _combine_recv(token: Any, places: Any, send_counts: Any, *add: Any, call: Call) -> Any:
    """The leaves are like those of ``add``, which may vary over further axes."""
    t = call.num_tokens
    slots = ((t, call.slot_width), jnp.float32)
    if add:
        return [*_received(token, call, slots), *add]
    return _received(token, call, slots, *_leaves(t, call))


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
    """A primitive that lowers to the custom call ``smfree_<name>``; see `portable` for the rest."""
    primitive = Primitive(f"smfree_{name}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract_eval)
    compat.impl(primitive)
    lower_portable: Any = mlir.lower_fun(getattr(portable, name), multiple_results=True)
    lower_position: Any = mlir.lower_fun(_position, multiple_results=False)

    def lower(ctx: Any, token: Any, *operands: Any, call: Call) -> Any:
        call.group.check_devices(call.call_site, compat.lowering_mesh(ctx))
        if call.group.backend == "portable":
            # Rows are what they are stored as, see `fp8.as_stored`.
            stored = _barrier((token, *operands))
            # The program may refuse promotion; its setting is not for code of the library.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return _barrier(lower_portable(ctx, *stored, call=call))
        token_aval, *avals = ctx.avals_in
        (position,) = lower_position(ctx.replace(avals_in=[]), group=call.group)
        ctx = ctx.replace(avals_in=[token_aval, compat.ShapedArray((2,), jnp.int32), *avals])
        return _custom_call(name, ctx, token, position, *operands, call=call)

    mlir.register_lowering(primitive, lower)
    return primitive


def _lower_token(ctx: Any, zeros: Any, *, call: Call) -> Any:
    portable = call.group.backend == "portable"
    return [zeros] if portable else _custom_call("token", ctx, zeros, call=call)


# On the CPU it makes what begins with one token a sequence of its own, in which ranks that disagree
# are found out at once. GPUs run all operations in one order, and need no name for a sequence.
token_p = Primitive("smfree_token")
token_p.multiple_results = True
token_p.def_abstract_eval(lambda zeros, *, call: [zeros])
compat.impl(token_p)
mlir.register_lowering(token_p, lambda ctx, zeros, *, call: [zeros])
mlir.register_lowering(token_p, _lower_token, platform="cpu")
dispatch_send_p = _primitive("dispatch_send", _dispatch_send)
dispatch_recv_p = _primitive("dispatch_recv", _dispatch_recv)
dispatch_send_cached_p = _primitive("dispatch_send_cached", token_in_flight)
dispatch_recv_cached_p = _primitive("dispatch_recv_cached", _dispatch_recv_cached)
dispatch_recv_weighted_p = _primitive("dispatch_recv_weighted", _dispatch_recv_weighted)
combine_send_p = _primitive("combine_send", token_in_flight)
combine_send_weighted_p = _primitive("combine_send_weighted", token_in_flight)
combine_recv_p = _primitive("combine_recv", _combine_recv)

# Which results of a dispatch are its routing: integers that all operations along it need.
ROUTING = {dispatch_send_p: slice(1, 3), dispatch_recv_p: slice(2, 8)}
RECV_PRIMITIVES = frozenset(
    {dispatch_recv_p, dispatch_recv_cached_p, dispatch_recv_weighted_p, combine_recv_p}
)

tie_p = Primitive("smfree_tie")
tie_p.multiple_results = True
tie_p.def_abstract_eval(lambda *avals: list(avals))
compat.impl(tie_p)
mlir.register_lowering(tie_p, lambda ctx, *values: _barrier(values))
