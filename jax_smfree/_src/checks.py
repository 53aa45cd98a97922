# SPDX-License-Identifier: Apache-2.0
"""What is checked at the Python call: got, expected, where, cure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jax_smfree._src import compat
from jax_smfree._src.token import DispatchResult, Token

if TYPE_CHECKING:
    from jax_smfree._src.group import EpGroup


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
            f"{state.operation}_recv first; two operations in flight at once need two lanes "
            "(EpConfig.num_lanes, group.token(lane))."
        )
    if operation is not None and (state is None or state.operation != operation):
        got = "a token that is ready" if state is None else f"a token {state}"
        raise ValueError(
            f"{name}: got {got}, expected one that {operation}_send returned (and that was not "
            "received yet)."
        )
    check_open(name, token.group)
    check_manual(name, token.group)
    if token.array.ndim != 1 or token.array.shape != (token.group.token_size,):
        raise ValueError(
            f"{name}: got a token of shape {token.array.shape}, expected "
            f"({token.group.token_size},) per rank. A token that crosses a shard_map boundary "
            "needs group.token_spec as its spec; a token cannot be vmapped or stacked."
        )
    return token.group


def check_open(name: str, group: EpGroup) -> None:
    """``group`` was not closed."""
    if group.closed:
        raise ValueError(
            f"{name}: the EpGroup is closed. Create a new one with EpGroup.create, and keep it "
            "open (it is a context manager) as long as programs use it."
        )


def check_manual(name: str, group: EpGroup) -> None:
    """The call stands in a ``shard_map`` that is manual over all of the group's mesh."""
    manual = compat.manual_axes()
    missing = [a for a in group.mesh_axes if a not in manual]
    if missing:
        where = f"a shard_map over {sorted(manual)}" if manual else "no shard_map"
        raise ValueError(
            f"{name}: got {where}, expected one with the mesh axes {missing} manual. Call it "
            f"inside jax.shard_map(..., mesh=mesh) over all axes {list(group.mesh_axes)} of the "
            "group's mesh."
        )


def check_array(
    name: str, what: str, value: Any, shape: tuple[int, ...], dtype: Any, meaning: str
) -> jax.Array:
    """``value`` as an array of this shape and dtype; ``meaning`` names the sizes."""
    if not isinstance(value, (jax.Array, jnp.ndarray)) and not hasattr(value, "dtype"):
        raise TypeError(
            f"{name}: got a {type(value).__name__} as {what}, expected an array {meaning}."
        )
    array: jax.Array = jnp.asarray(value)
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
    shape = getattr(x, "shape", None)
    if shape is None or len(shape) != 2:
        raise ValueError(
            f"{name}: got x of shape {shape}, expected [T, H], one row per token. Reshape "
            "x[B, T, H] to x[B * T, H]."
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
    tokens = d.handle.num_tokens
    expected = ((group.num_ranks, tokens, group.config.top_k), group.key.relay_shape(tokens))
    got = (d.handle.rows.shape, d.handle.relay.shape)
    if got != expected:
        raise ValueError(
            f"{name}: got a handle of shapes {got} (rows, relay), expected {expected}: it belongs "
            "to another group."
        )
    return d
