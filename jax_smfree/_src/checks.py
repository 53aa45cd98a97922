# SPDX-License-Identifier: Apache-2.0
"""What is checked of tokens and results at the Python call: got, expected, where, cure."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from jax_smfree._src import arguments
from jax_smfree._src.group import EpGroup
from jax_smfree._src.group_key import GroupKey
from jax_smfree._src.rows import largest_stride
from jax_smfree._src.token import DispatchResult, Handle, Token

# In which trace a token was received. One function may be traced twice, and each branch of a
# ``cond`` may receive a token from outside of it.
_received_in: weakref.WeakKeyDictionary[Token, Any] = weakref.WeakKeyDictionary()


def check_token(name: str, token: Any, operation: str | None) -> EpGroup:
    """``token`` is ready (``operation`` is None), or in flight in ``operation``."""
    if not isinstance(token, Token):
        raise TypeError(
            f"{name}: got a {type(token).__name__} as the token, expected a jax_smfree Token. "
            "Start with group.token(), and pass on the token that the last operation returned."
        )
    state = token.state
    if operation is None and state is not None:
        raise ValueError(
            f"{name}: got a token {state}, expected one that is ready. Call "
            f"{state.operation}_recv first; an operation beside it begins with a token of its "
            "own, group.token()."
        )
    if operation is not None and (state is None or state.operation != operation):
        got = "a token that is ready" if state is None else f"a token {state}"
        raise ValueError(
            f"{name}: got {got}, expected one that {operation}_send returned (and that was not "
            "received yet)."
        )
    token.group._check_open(name)
    token.group.key.check_mesh(name)
    _check_token_arrays(name, token)
    return token.group


def _check_token_arrays(name: str, token: Token) -> None:
    size, state = token.group.token_size, token.state
    if state is not None:
        row_bytes = largest_stride(state.rows.leaves, state.wire, state.grad_wire, state.keep)
        size += token.group.key.message_floats(state.num_tokens, state.carries_slots, row_bytes)
    if token.array.shape != (size,):
        raise ValueError(
            f"{name}: got a token of shape {token.array.shape}, expected ({size},) per rank. A "
            "token that crosses a shard_map boundary needs group.token_spec as its spec; tokens "
            "cannot be stacked."
        )
    routing = jax.tree.leaves(token.routing)
    for array, dtype in [(token.array, jnp.float32), *((r, jnp.int32) for r in routing)]:
        if array.dtype != dtype:
            raise TypeError(
                f"{name}: got a token with an array of {array.dtype} that was of "
                f"{jnp.dtype(dtype).name}: it was cast, but holds no values that could be. Leave "
                "tokens out where a jax.tree.map casts parameters or activations."
            )


def check_not_received(name: str, token: Token) -> None:
    """``token`` was not received before, as far as one can see while tracing; now it is."""
    trace = get_opaque_trace_state()
    if _received_in.get(token) == trace:
        raise ValueError(
            f"{name}: got a token {token.state}, which was received already; an operation is "
            "received once. Go on with the token that the first recv returned."
        )
    _received_in[token] = trace


def check_array(
    name: str, what: str, value: Any, shape: tuple[int, ...], dtype: Any, meaning: str
) -> jax.Array:
    """``value`` as an array of this shape and dtype; ``meaning`` names the sizes."""
    array = arguments.as_array(name, what, value, f"an array {meaning}{list(shape)}")
    if array.shape != shape:
        raise ValueError(f"{name}: got {what}{list(array.shape)}, expected {meaning}{list(shape)}.")
    if array.dtype != dtype:
        raise TypeError(
            f"{name}: got {what} of {array.dtype}, expected {jnp.dtype(dtype).name}. Cast it with "
            f".astype(jnp.{jnp.dtype(dtype).name})."
        )
    return array


def check_result(name: str, group: EpGroup, d: Any) -> DispatchResult:
    """``d`` is what a dispatch of this group returned."""
    if not isinstance(d, DispatchResult):
        raise TypeError(
            f"{name}: got a {type(d).__name__} as d, expected the DispatchResult that "
            "dispatch_recv returned."
        )
    check_handle(name, group, "d", d.handle)
    shape = group.config.recv_shape(d.handle.num_tokens, group.num_ranks)
    for path, leaf in jax.tree.leaves_with_path(d.x):
        if leaf.shape[: len(shape)] != shape:
            rows = " x ".join(map(str, shape))
            raise ValueError(
                f"{name}: got a d with d.x{jax.tree_util.keystr(path)}{list(leaf.shape)}, expected "
                f"the {rows} rows that dispatch_recv returned: the handle knows each by its place. "
                "To leave some out, set their weights to zero."
            )
    return d


def check_handle(name: str, group: EpGroup, what: str, handle: Any) -> Handle:
    """``handle`` is of a dispatch of this group; the argument ``what`` has it, or is it."""
    if not isinstance(handle, Handle):
        raise TypeError(
            f"{name}: got a {type(handle).__name__} as {what}, expected the handle of a dispatch, "
            "d.handle."
        )
    if handle.group is not group.key:
        differences = _differences(handle.group, group.key)
        raise ValueError(
            f"{name}: got a {what} of another group than the token's: {differences}. What a group "
            f"dispatched it also combines: pass a token of the group of {what}."
        )
    tokens, ranks, top_k = handle.num_tokens, group.num_ranks, group.config.top_k
    of_experts = (group.config.num_experts // ranks,)
    fields = f"{what}.handle" if what == "d" else what
    for field, shape in {
        "places": (tokens, min(top_k, ranks)),
        "send_counts": (ranks,),
        "rows": (group.config.num_wire_rows(tokens, ranks), top_k),
        "recv_counts": (ranks,),
        "relay": group.key.relay_shape(tokens),
        "group_sizes": of_experts,
        "num_rows": of_experts,
        "num_dropped": (1,),
    }.items():
        value = getattr(handle, field)
        if (value.shape, value.dtype) != (shape, jnp.int32):
            raise ValueError(
                f"{name}: got {fields}.{field} of {value.dtype}{list(value.shape)}, expected "
                f"int32{list(shape)}, as dispatch_recv returned it. Leave handles out where a "
                "jax.tree.map casts or slices."
            )
    return handle


def _differences(got: GroupKey, expected: GroupKey) -> str:
    """In what two groups differ, in the words of `EpGroup.create`."""

    def made_of(group: GroupKey) -> dict[str, Any]:
        return {"axis": group.axis, "mesh": dict(group.mesh.shape), **vars(group.config)}

    here, there = made_of(expected), made_of(got)
    differ = [f"{n}={there[n]!r} instead of {here[n]!r}" for n in here if here[n] != there[n]]
    return ", ".join(differ) or "one made by another EpGroup.create with the same sizes"
