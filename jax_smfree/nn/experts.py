# SPDX-License-Identifier: Apache-2.0
"""The compute of the experts of a rank: an MLP for each group of rows.

A layer takes its experts as a function, `Experts`. The one here is the ready one; a user's own may
do anything with the rows of a rank.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_smfree._src import arguments, rows
from jax_smfree.nn import matmul
from jax_smfree.nn.activations import Activation, swiglu
from jax_smfree.nn.matmul import GroupedMatmul, grouped_matmul
from jax_smfree.nn.params import MlpParams, check_mlp

# (x [N, H], group_sizes int32 [E / R], local_expert int32 [N], params) -> y [N, H]. ``params`` is
# ``MoeParams.experts``, any pytree of arrays whose first axis is that of this rank's experts. Rows
# past sum(group_sizes) may be anything in the result; those in a group's padding must not be NaN
# where the other rows are not. With EpConfig.layout="padded" x is [E / R, C, H], as y and
# local_expert are, and rows past group_sizes may be anything in x and in the gradient of y, too.
# With weight_on="hidden" they get ``weights`` [N] too, by name, and return weighted results.
Experts = Callable[..., Array]

# Parameters of an MLP before its last matmul (gate and its bias, up and its), and of that.
FirstParams = tuple[Array | None, Array | None, Array, Array | None]
LastParams = tuple[Array, Array | None]

# Matmuls of the same rows, (x, [(w, bias), ...], weights=None) -> [y, ...], and what may be put
# around them. Only biases are weighed.
Linear = Callable[..., list[Array]]
Around = Callable[[Linear], Linear]

_FIRST_MATMULS = "smfree_mlp"  # the name of what `save_mlp_policy` keeps
_save_first_matmuls = jax.checkpoint_policies.save_only_these_names(_FIRST_MATMULS)


def save_mlp_policy(primitive: Any, *avals: Any, **params: Any) -> bool:
    """A ``jax.checkpoint`` policy: keep what MLPs have multiplied with ``gate`` and ``up``.

    Then a rematerialised layer computes the activation again and, with ``weight_on="hidden"``, no
    matmul. Its rows are sent again, unless the policy is joined with that of
    `jax_smfree.save_comm_policy`. See docs/moe_layer.md, "What is kept for the backward pass".

    Example:
      >>> policy = jax.checkpoint_policies.save_from_both_policies(
      ...     smfree.save_comm_policy, nn.save_mlp_policy)
      >>> def layer(token, params, x):
      ...     return nn.moe_layer(token, params, x, weight_on="hidden")
      >>> layer = jax.checkpoint(layer, policy=policy)
      >>> def of_rank(params, x):  # inside shard_map
      ...     token, out, aux = layer(group.token(), params, x)
      ...     return x + out
      >>> step = jax.shard_map(of_rank, mesh=mesh, in_specs=(specs, P("ep")), out_specs=P("ep"))
      >>> jax.jit(jax.grad(lambda p, x: step(p, x).sum(), argnums=1))(params, x).shape
      (16, 16)
    """
    kept: bool = _save_first_matmuls(primitive, *avals, **params)
    return kept


def grouped_mlp(
    x: Array,
    group_sizes: Array,
    local_expert: Array,
    params: MlpParams,
    *,
    activation: Activation = swiglu,
    grouped_matmul: GroupedMatmul = grouped_matmul,
    weights: Array | None = None,
) -> Array:
    """`mlp` of every group of rows with the weights of its expert.

    Shapes: ``x`` [N, H], ``group_sizes`` int32 [E / R], ``local_expert`` int32 [N] (of
    `local_expert`), ``params`` [E / R, ...] -> [N, H] in the dtype of ``x``, to which the
    parameters are cast. Rows past ``sum(group_sizes)`` may be anything.

    ``weights`` float32 [N] multiply the results, by multiplying what goes into the last matmul: its
    gradient then needs no results, which are twice or more as long.

    In the padded layout, ``x`` [E / R, C, H] and ``local_expert`` [E / R, C] -> [E / R, C, H], each
    matmul is one of a batch, ``grouped_matmul`` is not called, and rows past ``group_sizes`` reach
    neither outputs, where they are zero, nor gradients.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes.

    Example:
      >>> sizes = jnp.full(8, 2, jnp.int32)  # two rows for each of eight experts
      >>> nn.grouped_mlp(x, sizes, nn.local_expert(sizes, len(x)), params.experts).shape
      (16, 16)
    """
    of = _unchanged, x, group_sizes, local_expert, params
    return _grouped_mlp(*of, activation=activation, grouped_matmul=grouped_matmul, weights=weights)


def is_ready(experts: Experts) -> bool:
    """Whether these are `grouped_mlp`, with another activation or grouped matmul or not."""
    return of_partial(experts)[0] is grouped_mlp


def around_matmuls(experts: Experts, around: Around, **options: Any) -> Experts:
    """Ready experts with something put around each of their matmuls, and with these options."""
    return functools.partial(_grouped_mlp, around, **of_partial(experts)[1] | options)


def of_partial(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of a ``functools.partial`` of keywords alone, and these; any other as it is."""
    if isinstance(function, functools.partial) and not function.args:
        return function.func, function.keywords
    return function, {}


def _unchanged(linear: Linear) -> Linear:
    return linear


def _grouped_mlp(
    around: Around,
    x: Array,
    group_sizes: Array,
    local_expert: Array,
    params: MlpParams,
    *,
    activation: Activation = swiglu,
    grouped_matmul: GroupedMatmul = grouped_matmul,
    weights: Array | None = None,
) -> Array:
    name = "grouped_mlp"
    x = arguments.as_array(name, "x", x, "an array [N, H], or [E / R, C, H]")
    is_padded = x.ndim == 3
    group_sizes = arguments.array(name, "group_sizes", group_sizes, ("E / R",), jnp.integer)
    x = arguments.array(name, "x", x, (*group_sizes.shape, "C", "H") if is_padded else ("N", "H"))
    of_rows = x.shape[:-1]
    local_expert = arguments.array(name, "local_expert", local_expert, of_rows, jnp.integer)
    check_mlp(name, "params", params, group_sizes.shape, x.shape[-1])
    arguments.function(name, "activation", activation)
    arguments.function(name, "grouped_matmul", grouped_matmul)
    if weights is not None:
        weights = arguments.array(name, "weights", weights, of_rows, np.float32)
    if is_padded:
        return _batched_mlp(name, around, x, local_expert, params, activation, weights)

    def linear(x: Array, params: Sequence[LastParams], weights: Array | None = None) -> list[Array]:
        ws = [w.astype(x.dtype) for w, _ in params]
        ys: Sequence[Array] = (
            matmul.grouped_matmuls(x, ws, group_sizes)
            if grouped_matmul is matmul.grouped_matmul
            else [grouped_matmul(x, w, group_sizes) for w in ws]
        )
        return [with_bias(x, *of, weights) for of in zip(params, ys, strict=True)]

    def with_bias(x: Array, params: LastParams, y: Array, weights: Array | None) -> Array:
        w, bias = params
        shape = (x.shape[0], w.shape[2])
        y = arguments.array(name, "the result of grouped_matmul", y, shape)
        if bias is None:
            return y
        return y + _weighted(_of_each_row(bias.astype(x.dtype), local_expert), weights)

    return _mlp(name, x, params, activation, around(linear), weights)


def local_expert(group_sizes: Array, num_rows: int) -> Array:
    """int32 [N]: the local expert of each row of ``d.x``, and E / R past the last group.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes, or a number that is no size.

    Example:
      >>> nn.local_expert(jnp.array([2, 0, 1]), num_rows=5)
      Array([0, 0, 2, 3, 3], dtype=int32)
    """
    name = "local_expert"
    group_sizes = arguments.array(name, "group_sizes", group_sizes, ("E / R",), jnp.integer)
    num_rows = arguments.integer(name, "num_rows", num_rows, least=0)
    return rows.local_expert(group_sizes, (num_rows,))


def _batched_mlp(
    where: str,
    around: Around,
    x: Array,
    local_expert: Array,
    params: MlpParams,
    activation: Activation,
    weights: Array | None,
) -> Array:
    """`grouped_mlp` of ``x`` [E / R, C, H].

    Rows outside of groups are selected away before the matmuls and after them: a selection is one
    backward, too, and without the second a gradient that is NaN would meet the zeros of the first.
    """
    in_a_group = (local_expert < x.shape[0])[..., None]

    def linear(x: Array, w: Array, bias: Array | None, weights: Array | None = None) -> Array:
        y = jnp.einsum("ech,ehf->ecf", x, w.astype(x.dtype))
        return y if bias is None else y + _weighted(bias.astype(x.dtype)[:, None, :], weights)

    zero = jnp.zeros((), x.dtype)
    if weights is not None:
        weights = jnp.where(in_a_group[..., 0], weights, 0)
    x = jnp.where(in_a_group, x, zero)
    y = _mlp(where, x, params, activation, around(one_by_one(linear)), weights)
    return jnp.where(in_a_group, y, zero)


def one_by_one(multiply: Callable[..., Array]) -> Linear:
    """Of what takes one weight, ``multiply(x, w, bias)``, and may take weights of the bias."""

    def linear(x: Array, params: Sequence[LastParams], *weights: Array | None) -> list[Array]:
        return [multiply(x, *each, *weights) for each in params]

    return linear


def first_and_last(params: MlpParams) -> tuple[FirstParams, LastParams]:
    first = params.gate, params.gate_bias, params.up, params.up_bias
    return first, (params.down, params.down_bias)


def _mlp(
    where: str,
    x: Array,
    params: MlpParams,
    activation: Activation,
    linear: Linear,
    weights: Array | None,
) -> Array:
    first, last = first_and_last(params)
    hidden = before_last(where, x, first, activation, linear)
    (y,) = linear(_weighted(hidden, weights), [last], weights)
    return y


def before_last(
    where: str, x: Array, params: FirstParams, activation: Activation, linear: Linear
) -> Array:
    """What goes into the last matmul of an MLP."""
    gate, gate_bias, up, up_bias = params
    of = [(up, up_bias)] if gate is None else [(gate, gate_bias), (up, up_bias)]
    ys = [jax.ad_checkpoint.checkpoint_name(y, _FIRST_MATMULS) for y in linear(x, of)]
    hidden = activation(*ys)
    return arguments.array(where, "the result of activation", hidden, ys[-1].shape, x.dtype)


def _weighted(x: Array, weights: Array | None) -> Array:
    if weights is None:
        return x
    return (x.astype(jnp.float32) * weights[..., None]).astype(x.dtype)


def _of_each_row(bias: Array, local_expert: Array) -> Array:
    """The bias [E / R, F] of each row's expert, zero past the last group.

    A matmul and not a gather, because so its gradient is one: that of a gather is a scatter-add,
    which on GPUs adds to few rows from many threads, slowly and in any order. Zero by a selection,
    so that the gradient takes nothing from rows past the last group, which may be NaN.
    """
    experts = bias.shape[0]
    chosen = jax.nn.one_hot(local_expert, experts, dtype=bias.dtype)
    rows = jnp.matmul(chosen, bias, precision=jax.lax.Precision.HIGHEST)
    return jnp.where((local_expert < experts)[:, None], rows, jnp.zeros((), bias.dtype))
