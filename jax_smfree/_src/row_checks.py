# SPDX-License-Identifier: Apache-2.0
"""What is checked of rows at the Python call: got, expected, where, cure."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_smfree import _native
from jax_smfree._src import arguments, checks, compat
from jax_smfree._src.fp8 import Fp8
from jax_smfree._src.group import EpGroup
from jax_smfree._src.rows import DTYPES, FLOATS, Leaf, Rows, stride

# What the first sizes of ``d.x`` are called, by how many there are.
NAMES = {1: "N", 2: "E / R, C"}


def check_sent(
    name: str, group: EpGroup, x: Any, wire: Fp8 | None, grad_wire: Fp8 | None
) -> tuple[Rows, list[jax.Array]]:
    """``x`` is a pytree of arrays [T, ...] with T up to ``max_tokens``."""
    paths = _arrays(name, "x", x, DTYPES, "T", "one row per token")
    counts = {what: array.shape[0] for what, array in paths.items()}
    tokens, most = next(iter(counts.values())), group.config.max_tokens
    if not isinstance(tokens, int):
        raise ValueError(
            f"{name}: got x{list(next(iter(paths.values())).shape)}, expected a number of rows: "
            "messages and their places are laid out for it while tracing, so a symbolic size "
            "cannot be exported. Export the program for each size, or for max_tokens, and pad with "
            "topk_idx of -1."
        )
    for what, count in counts.items():
        if count != tokens:
            raise ValueError(
                f"{name}: got {what} with {count} rows, expected {tokens}, as the first array of "
                "x has: a row is made of one row of each."
            )
    rows = _checked_rows(name, "x", group, x, paths, wire, grad_wire)
    if not 1 <= tokens <= most:
        raise ValueError(
            f"{name}: got x with {tokens} rows on each rank (num_ranks = {group.num_ranks}), "
            f"expected 1 to EpConfig.max_tokens = {most}. Raise it, or split the rows over more "
            "devices."
        )
    return rows


def check_returned(
    name: str, group: EpGroup, y: Any, shape: tuple[int, ...], wire: Fp8 | None,
    grad_wire: Fp8 | None,
) -> tuple[Rows, list[jax.Array]]:  # fmt: skip
    """``y`` is a pytree of arrays [*shape, ...] of floats; the rows are [N, ...]."""
    sizes = NAMES[len(shape)]
    paths = _arrays(name, "y", y, FLOATS, sizes, "row by row the results for d.x")
    for what, array in paths.items():
        if array.shape[: len(shape)] != shape:
            raise ValueError(
                f"{name}: got {what}{list(array.shape)}, expected [{sizes}, ...] = "
                f"[{', '.join(map(str, shape))}, ...], as d.x has."
            )
        paths[what] = array.reshape(-1, *array.shape[len(shape) :])
    return _checked_rows(name, "y", group, y, paths, wire, grad_wire)


def check_added(name: str, add: Any, rows: Rows, num_tokens: int) -> list[jax.Array]:
    """``add`` is of the structure, shapes and dtypes of the result."""
    if add is None:
        return []
    if (tree := jax.tree.structure(add)) != rows.tree:
        raise ValueError(
            f"{name}: got add of the structure {tree}, expected that of y, {rows.tree}: it is "
            "added to the result."
        )
    leaves = jax.tree.leaves_with_path(add)
    arrays = [
        checks.check_array(
            name, f"add{jax.tree_util.keystr(path)}", leaf, (num_tokens, *shape), dtype,
            "[T, ...] = ",
        )
        for (path, leaf), shape, dtype in zip(leaves, rows.shapes, rows.dtypes, strict=True)
    ]  # fmt: skip
    return rows.flat(arrays)


def _arrays(
    name: str, what: str, value: Any, dtypes: tuple[Any, ...], count: str, meaning: str
) -> dict[str, jax.Array]:
    """The arrays of a pytree, by what a message calls them."""
    leaves = jax.tree.leaves_with_path(value)
    if not 1 <= len(leaves) <= _native.MAX_LEAVES:
        raise ValueError(
            f"{name}: got {what} of {len(leaves)} arrays, expected 1 to {_native.MAX_LEAVES}. "
            "Concatenate arrays of one dtype along their last axis."
        )
    found = {}
    for path, leaf in leaves:
        this = what + jax.tree_util.keystr(path)
        expected = f"an array [{count}, ...], {meaning}"
        array = found[this] = arguments.as_array(name, this, leaf, expected)
        if array.ndim == 0 or 0 in array.shape[1:]:
            raise ValueError(
                f"{name}: got {this}{list(array.shape)}, expected {expected}, of one element or "
                "more."
            )
        if array.dtype not in dtypes:
            cure = (
                "Integers are carried by a dispatch, but not summed."
                if array.dtype in DTYPES
                else "Cast it with .astype."
            )
            raise TypeError(
                f"{name}: got {this} of {array.dtype}, expected one of "
                f"{', '.join(d.name for d in dtypes)}. {cure}"
            )
    return found


def _checked_rows(
    name: str, what: str, group: EpGroup, value: Any, paths: dict[str, jax.Array],
    wire: Fp8 | None, grad_wire: Fp8 | None,
) -> tuple[Rows, list[jax.Array]]:  # fmt: skip
    """The rows fit into the messages of the group."""
    arrays = list(paths.values())
    rows = Rows.of(jax.tree.unflatten(jax.tree.structure(value), arrays))
    for which, how in {"wire": wire, "grad_wire": grad_wire}.items():
        _check_blocks(name, dict(zip(paths, rows.leaves, strict=True)), which, how)
    row_bytes, most = stride(rows.leaves, wire), group.key.row_bytes
    if row_bytes > most:
        config = group.config
        shapes = ", ".join(f"{this}{list(array.shape)}" for this, array in paths.items())
        raise ValueError(
            f"{name}: got {shapes}, whose rows take {row_bytes} bytes each on the wire, expected "
            f"at most {most}, as EpConfig.hidden = {config.hidden} of {config.dtype} says. "
            f"Reshape {what}[B, T, H] to {what}[B * T, H], or raise hidden."
        )
    return rows, rows.flat(arrays)


def _check_blocks(name: str, leaves: dict[str, Leaf], which: str, wire: Fp8 | None) -> None:
    """Rows that are quantised are of whole blocks."""
    for what, leaf in leaves.items():
        if wire is not None and leaf.is_quantised(wire) and leaf.width % wire.block:
            raise ValueError(
                f"{name}: got {what} with {leaf.width} elements in a row and {which}={wire}, "
                f"expected a multiple of the block of {wire.block}, which have a scale together. "
                f"Fill the rows up, take a smaller block, or {which}=None."
            )


def check_wire(name: str, which: str, given: Any) -> Fp8 | None:
    """How rows travel."""
    if given is None:
        return None
    return arguments.instance(name, which, given, Fp8, "Or None: rows travel as they are.")


def check_capacity(name: str, capacity: Any, num_rows: int, axes: frozenset[str]) -> jax.Array:
    """How many of ``num_rows`` may be filled, int32 [1]; ``axes``: what the rows vary over."""
    if capacity is None:
        capacity = num_rows
    if not isinstance(capacity, jax.Array):
        capacity = min(arguments.integer(name, "capacity", capacity, least=0), num_rows)
    elif capacity.shape or not jnp.issubdtype(capacity.dtype, jnp.integer):
        raise TypeError(
            f"{name}: got capacity {capacity.dtype}{list(capacity.shape)}, expected an int32 "
            "scalar: how many rows of d.x may be filled on this rank, or for each local expert."
        )
    elif capacity.dtype.name in ("uint32", "int64", "uint64"):
        capacity = jnp.clip(capacity, 0, arguments.INT32_MAX)
    limit = jnp.asarray(capacity, jnp.int32).reshape(1)
    if further := sorted(compat.varying_axes(limit) - axes):
        raise ValueError(
            f"{name}: got a capacity that varies over the mesh axes {further}, expected one that "
            "is the same along them, as the rows are. Take jax.lax.pmin over them, or vary x."
        )
    return limit
