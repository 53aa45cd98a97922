# SPDX-License-Identifier: Apache-2.0
"""Matmuls of groups of rows, each with a matrix of its own."""

import functools
import importlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jax_smfree._src import arguments, compat

# (x [N, H], w [G, H, F], group_sizes int32 [G]) -> [N, F], as jax.lax.ragged_dot: the first
# group_sizes[0] rows times w[0], and so on. Rows past sum(group_sizes) may be anything.
GroupedMatmul = Callable[[Array, Array, Array], Array]

_HOPPER = re.compile(r"NVIDIA G?H(20|100|200|800)\b")


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """The first ``group_sizes[0]`` rows times ``w[0]``, the next ones times ``w[1]``, and so on.

    Shapes: ``x`` [N, H], ``w`` [G, H, F], ``group_sizes`` int32 [G] -> [N, F]. Rows past
    ``sum(group_sizes)`` are not computed: those of the result may be anything, NaN included, and
    those of ``x`` reach no other row, neither forward nor backward.
    Differentiation: of ``x`` and ``w``, once, in reverse mode; again grouped matmuls.

    Raises:
      ValueError, TypeError: for wrong shapes, or ``x`` and ``w`` that are not of one float dtype.

    On a Hopper GPU, for bfloat16 and float16 with H and F multiples of 128 and from JAX 0.11 on,
    these are the kernels of `jax_smfree.nn.hopper`; anything else is ``jax.lax.ragged_dot``. Inside
    ``jax.shard_map`` the mesh says which device it is, outside the default device does.

    Example:
      >>> w = jnp.stack([jnp.eye(16), 3 * jnp.eye(16)])
      >>> y = nn.grouped_matmul(x, w, jnp.array([10, 6]))
      >>> jnp.allclose(y[:10], x[:10]), jnp.allclose(y[10:], 3 * x[10:])
      (Array(True, dtype=bool), Array(True, dtype=bool))
    """
    (y,) = grouped_matmuls(x, (w,), group_sizes)
    return y


def grouped_matmuls(x: Array, ws: Sequence[Array], group_sizes: Array) -> tuple[Array, ...]:
    """`grouped_matmul` with each of the ``ws``, all of one shape.

    On a Hopper GPU the gradient of ``x`` is one matmul over all of them, which reads and writes no
    sums in between.
    """
    checked = [_operands("grouped_matmul", x, w, group_sizes) for w in ws]
    (x, _, sizes), ws = checked[0], [w for _, w, _ in checked]
    num_sms, alike = _sms_of_hopper(), len({w.shape for w in ws}) == 1
    if num_sms is None or not (alike and _suits_kernels(x, ws[0])) or _kernels() is None:
        return tuple(_ragged_dot(x, w, sizes) for w in ws)
    axes = frozenset().union(*map(compat.varying_axes, (x, *ws)))
    x, sizes, *ws = (compat.varying(v, axes) for v in (x, sizes, *ws))
    return _on_hopper(x, tuple(ws), sizes, num_sms)


def block_matmul(x: Array, w: Array, group_sizes: Array, *, block_rows: int) -> Array:
    """A grouped matmul as a batch of equal matmuls, one for every ``block_rows`` rows.

    Shapes: as `grouped_matmul`. All group sizes must be multiples of ``block_rows``: create the
    group with ``EpConfig(expert_alignment=block_rows)``. Rows past ``sum(group_sizes)`` may be
    anything in ``x``, and are zero in the result. On a CPU, where XLA multiplies every row with
    every expert for ``ragged_dot``, this is the faster one from two experts per rank on.

    Differentiation: of ``x`` and ``w``. What lies past the groups reaches no gradient.
    Memory: a copy of the weights for each block, so blocks should not be small.

    Raises:
      ValueError, TypeError: as `grouped_matmul`; if N is not a multiple of ``block_rows``.

    Example:
      >>> w = jnp.stack([jnp.eye(16), 3 * jnp.eye(16)])
      >>> y = nn.block_matmul(x, w, jnp.array([12, 4]), block_rows=4)
      >>> jnp.allclose(y[:12], x[:12]), jnp.allclose(y[12:], 3 * x[12:])
      (Array(True, dtype=bool), Array(True, dtype=bool))
    """
    x, w, group_sizes = _operands("block_matmul", x, w, group_sizes)
    block_rows = arguments.integer("block_matmul", "block_rows", block_rows)
    if x.shape[0] % block_rows:
        raise ValueError(
            f"block_matmul: got {x.shape[0]} rows, expected a multiple of block_rows={block_rows}. "
            "Set EpConfig.expert_alignment to block_rows and recv_capacity to a multiple of it."
        )
    blocks = x.reshape(-1, block_rows, x.shape[1])
    first_rows = jnp.arange(blocks.shape[0], dtype=jnp.int32) * block_rows
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    group = jnp.searchsorted(ends, first_rows, side="right")
    # A block of the tail is multiplied too, with some expert. Zeros go in and come out, and, as
    # these selections are transposed, zeros for its gradients.
    in_a_group = (group < w.shape[0])[:, None, None]
    blocks = jnp.where(in_a_group, blocks, 0)
    out = jnp.einsum("brh,bhf->brf", blocks, w[jnp.minimum(group, w.shape[0] - 1)])
    return jnp.where(in_a_group, out, 0).reshape(x.shape[0], w.shape[2])


def _operands(where: str, x: Array, w: Array, group_sizes: Array) -> tuple[Array, Array, Array]:
    x = arguments.array(where, "x", x, ("N", "H"))
    w = arguments.array(where, "w", w, ("G", x.shape[1], "F"))
    if x.dtype != w.dtype:
        raise TypeError(
            f"{where}: got x of {x.dtype} and w of {w.dtype}, expected one dtype. Cast one with "
            ".astype."
        )
    sizes = arguments.array(where, "group_sizes", group_sizes, (w.shape[0],), jnp.integer)
    return x, w, sizes.astype(jnp.int32)


@jax.custom_jvp
def _ragged_dot(x: Array, w: Array, group_sizes: Array) -> Array:
    """``jax.lax.ragged_dot``, whose own tangent adds zeros where only ``x`` or ``w`` varies.

    These would be kept for the backward pass.
    """
    return jax.lax.ragged_dot(x, w, group_sizes)


def _ragged_dot_tangent(primals: Any, tangents: Any) -> Any:
    (x, w, group_sizes), (x_dot, w_dot, _) = primals, tangents
    factors = [(x_dot, w), (x, w_dot)]
    products = [
        jax.lax.ragged_dot(*pair, group_sizes)
        for pair in factors
        if not any(isinstance(factor, SymbolicZero) for factor in pair)
    ]
    return _ragged_dot(x, w, group_sizes), functools.reduce(jnp.add, products)


_ragged_dot.defjvp(_ragged_dot_tangent, symbolic_zeros=True)


def _sms_of_hopper() -> int | None:
    """How many SMs the GPU has that this is for; ``None`` if it is no Hopper."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind, num_sms = device.device_kind, device.num_cores
    else:
        default = jax.devices()[0]
        kind, num_sms = default.device_kind, getattr(default, "core_count", None)
    return num_sms if _HOPPER.match(kind) else None


def _suits_kernels(x: Array, w: Array) -> bool:
    # With 64 columns the kernels left zeros on an H200; see benchmarks/results.
    multiples = x.shape[1] % 128 == 0 and w.shape[2] % 128 == 0
    return multiples and x.dtype == w.dtype and x.dtype in (jnp.bfloat16, jnp.float16)


@functools.cache
def _kernels() -> Any:
    """`jax_smfree.nn.hopper`, which not every program needs and which takes a while to import."""
    if jax.__version_info__ >= (0, 11):
        return importlib.import_module("jax_smfree.nn.hopper")
    warnings.warn(
        "jax_smfree: grouped_matmul takes jax.lax.ragged_dot, which is many times slower than the "
        f"kernels for this GPU: they need JAX 0.11 or newer, and this is {jax.__version__}. "
        "pip install --upgrade jax",
        stacklevel=3,
    )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _on_hopper(
    x: Array, ws: tuple[Array, ...], group_sizes: Array, num_sms: int
) -> tuple[Array, ...]:
    matmul = functools.partial(_kernels().grouped_matmul, num_sms=num_sms)
    return tuple(_varying_as(x, matmul([x], [w], group_sizes)) for w in ws)


def _forward(x: Any, ws: tuple[Any, ...], group_sizes: Any, num_sms: int) -> Any:
    """Keeps what the gradients that are asked for need."""
    ys = _on_hopper(x.value, tuple(w.value for w in ws), group_sizes.value, num_sms)
    for_dws = tuple(x.value if w.perturbed else None for w in ws)
    for_dx = tuple(w.value for w in ws) if x.perturbed else None
    return ys, (for_dws, for_dx, group_sizes.value)


def _backward(num_sms: int, residuals: Any, dys: tuple[Any, ...]) -> Any:
    hopper = _kernels()
    xs, ws, group_sizes = residuals
    outer = functools.partial(hopper.grouped_outer_product, num_sms=num_sms)
    dx, dws, pairs = None, [], []
    for number, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        dw = None
        if not isinstance(dy, SymbolicZero):
            if x is not None:
                dy = _zeros_after_the_groups(dy, group_sizes, hopper.DEPTH)
                dw = _varying_as(x, outer(x, dy, group_sizes))
            if ws is not None:
                pairs.append((dy, ws[number]))
        dws.append(dw)
    if pairs:
        dx = hopper.grouped_matmul(
            *zip(*pairs, strict=True), group_sizes, num_sms=num_sms, transpose=True
        )
        dx = _varying_as(ws[0], dx)
    return dx, tuple(dws), None


_on_hopper.defvjp(_forward, _backward, symbolic_zeros=True)


def _varying_as(like: Array, value: Array) -> Array:
    """Kernels forget over which axes of a ``shard_map`` their operands vary."""
    result: Array = compat.varying(value, compat.varying_axes(like))
    return result


def _zeros_after_the_groups(y: Array, group_sizes: Array, count: int) -> Array:
    """``y`` with zeros in the ``count`` rows after the groups, written in place if XLA can."""
    count = min(count, y.shape[0])
    end = jnp.sum(group_sizes)
    first = jnp.minimum(end, y.shape[0] - count)
    rows = jax.lax.dynamic_slice_in_dim(y, first, count)
    in_a_group = first + jnp.arange(count) < end
    rows = jnp.where(in_a_group[:, None], rows, 0)
    return jax.lax.dynamic_update_slice_in_dim(y, rows, first, 0)
