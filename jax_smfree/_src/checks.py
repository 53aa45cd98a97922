# SPDX-License-Identifier: Apache-2.0
"""What is checked at the Python call: got, expected, where, cure."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from jax_smfree._src import arguments
from jax_smfree._src.group import EpGroup
from jax_smfree._src.group_key import GroupKey
from jax_smfree._src.token import DispatchResult, Token

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
            "own, on GPUs of another lane (EpConfig.num_lanes, group.token(lane))."
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
    if token.array.shape != (token.group.token_size,):
        raise ValueError(
            f"{name}: got a token of shape {token.array.shape}, expected "
            f"({token.group.token_size},) per rank. A token that crosses a shard_map boundary "
            "needs group.token_spec as its spec; tokens cannot be stacked."
        )
    for array, dtype in [(token.array, jnp.float32), *((r, jnp.int32) for r in token.routing)]:
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


def check_rows(name: str, group: EpGroup, x: Any) -> jax.Array:
    """``x`` is [T, H] with T up to ``max_tokens``."""
    config = group.config
    x = arguments.as_array(name, "x", x, "an array [T, H], one row per token")
    shape = x.shape
    if len(shape) != 2:
        raise ValueError(
            f"{name}: got x of shape {shape}, expected [T, H], one row per token. Reshape "
            "x[B, T, H] to x[B * T, H]."
        )
    if not isinstance(shape[0], int):
        raise ValueError(
            f"{name}: got x{list(shape)}, expected a number of rows: messages and their places "
            "are laid out for it while tracing, so a symbolic size cannot be exported. Export the "
            "program for each size, or for max_tokens, and pad with topk_idx of -1."
        )
    if not 1 <= shape[0] <= config.max_tokens:
        raise ValueError(
            f"{name}: got x with {shape[0]} rows, expected 1 to EpConfig.max_tokens = "
            f"{config.max_tokens}."
        )
    return check_array(name, "x", x, (shape[0], config.hidden), config.dtype, "[T, hidden] = ")


def check_result(name: str, group: EpGroup, d: Any) -> DispatchResult:
    """``d`` is what a dispatch of this group returned."""
    if not isinstance(d, DispatchResult):
        raise TypeError(
            f"{name}: got a {type(d).__name__} as d, expected the DispatchResult that "
            "dispatch_recv returned."
        )
    handle = d.handle
    if handle.group is not group.key:
        differences = _differences(handle.group, group.key)
        raise ValueError(
            f"{name}: got a d of another group than the token's: {differences}. What a group "
            "dispatched it also combines: pass a token of the group of d."
        )
    tokens, ranks, top_k = handle.num_tokens, group.num_ranks, group.config.top_k
    rows = group.config.num_recv_rows(tokens, ranks)
    if d.x.shape[:1] != (rows,):
        raise ValueError(
            f"{name}: got a d with d.x{list(d.x.shape)}, expected the {rows} rows that "
            "dispatch_recv returned: the handle knows each by its place. To leave some out, set "
            "their weights to zero."
        )
    for field, shape in {
        "places": (tokens, min(top_k, ranks)),
        "send_counts": (ranks,),
        "rows": (ranks, tokens, top_k),
        "recv_counts": (ranks,),
        "relay": group.key.relay_shape(tokens),
    }.items():
        value = getattr(handle, field)
        if (value.shape, value.dtype) != (shape, jnp.int32):
            raise ValueError(
                f"{name}: got d.handle.{field} of {value.dtype}{list(value.shape)}, expected "
                f"int32{list(shape)}, as dispatch_recv returned it. Leave handles out where a "
                "jax.tree.map casts or slices."
            )
    return d


def _differences(got: GroupKey, expected: GroupKey) -> str:
    """In what two groups differ, in the words of `EpGroup.create`."""

    def made_of(group: GroupKey) -> dict[str, Any]:
        return {"axis": group.axis, "mesh": dict(group.mesh.shape), **vars(group.config)}

    here, there = made_of(expected), made_of(got)
    differ = [f"{n}={there[n]!r} instead of {here[n]!r}" for n in here if here[n] != there[n]]
    return ", ".join(differ) or "one made by another EpGroup.create with the same sizes"
