# SPDX-License-Identifier: Apache-2.0
"""The compute of the experts: an MLP, for groups of rows or for all rows alike.

A layer takes its experts and its shared expert as functions, `Experts` and `Shared`. Those here are
the ready ones; a user's own may do anything with the rows of a rank.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_smfree._src import arguments
from jax_smfree.nn.activations import Activation, swiglu
from jax_smfree.nn.matmul import GroupedMatmul, grouped_matmul
from jax_smfree.nn.params import MlpParams, SigmoidGatedParams, check_mlp

# (x [N, H], group_sizes int32 [E / R], local_expert int32 [N], params) -> y [N, H]. ``params`` is
# ``MoeParams.experts``, any pytree of arrays whose first axis is that of this rank's experts. Rows
# past sum(group_sizes) may be anything in the result; those in a group's padding must not be NaN
# where the other rows are not.
Experts = Callable[..., Array]
# (x [T, H], params) -> [T, H]. ``params`` is ``MoeParams.shared``, any pytree of arrays.
Shared = Callable[[Array, Any], Array]


def mlp(x: Array, params: MlpParams, *, activation: Activation = swiglu) -> Array:
    """``activation(x @ gate, x @ up) @ down``, with the biases that there are.

    Shapes: ``x`` [T, H], ``params`` of one MLP -> [T, H] in the dtype of ``x``, to which the
    parameters are cast.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes.

    Example:
      >>> nn.mlp(x, params.shared).shape
      (16, 16)
    """
    x = arguments.array("mlp", "x", x, ("T", "H"))
    check_mlp("mlp", "params", params, (), x.shape[1])
    arguments.function("mlp", "activation", activation)

    def linear(x: Array, w: Array, bias: Array | None) -> Array:
        y = x @ w.astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype)[None, :]

    return _mlp("mlp", x, params, activation, linear)


def sigmoid_gated_mlp(
    x: Array, params: SigmoidGatedParams, *, activation: Activation = swiglu
) -> Array:
    """``sigmoid(x @ gate) * mlp(x)``: the shared expert of Qwen2-MoE and Qwen3-Next.

    Shapes: ``x`` [T, H], ``params`` of one MLP and its gate -> [T, H] in the dtype of ``x``.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes.

    Example:
      >>> gated = nn.SigmoidGatedParams(gate=jnp.zeros(16), mlp=params.shared)
      >>> jnp.allclose(nn.sigmoid_gated_mlp(x, gated), nn.mlp(x, params.shared) / 2)
      Array(True, dtype=bool)
    """
    name = "sigmoid_gated_mlp"
    x = arguments.array(name, "x", x, ("T", "H"))
    cure = "Make it with nn.init_moe(..., shared_gate=True)."
    arguments.instance(name, "params", params, SigmoidGatedParams, cure)
    gate = arguments.array(name, "params.gate", params.gate, (x.shape[1],))
    weight = jax.nn.sigmoid(x @ gate.astype(x.dtype))
    return weight[:, None] * mlp(x, params.mlp, activation=activation)


def grouped_mlp(
    x: Array,
    group_sizes: Array,
    local_expert: Array,
    params: MlpParams,
    *,
    activation: Activation = swiglu,
    grouped_matmul: GroupedMatmul = grouped_matmul,
) -> Array:
    """`mlp` of every group of rows with the weights of its expert.

    Shapes: ``x`` [N, H], ``group_sizes`` int32 [E / R], ``local_expert`` int32 [N] (of
    `local_expert`), ``params`` [E / R, ...] -> [N, H] in the dtype of ``x``, to which the
    parameters are cast. Rows past ``sum(group_sizes)`` may be anything.

    Raises:
      ValueError, TypeError: for wrong shapes or dtypes.

    Example:
      >>> sizes = jnp.full(8, 2, jnp.int32)  # two rows for each of eight experts
      >>> nn.grouped_mlp(x, sizes, nn.local_expert(sizes, len(x)), params.experts).shape
      (16, 16)
    """
    name = "grouped_mlp"
    x = arguments.array(name, "x", x, ("N", "H"))
    group_sizes = arguments.array(name, "group_sizes", group_sizes, ("E / R",), jnp.integer)
    local_expert = arguments.array(name, "local_expert", local_expert, (x.shape[0],), jnp.integer)
    check_mlp(name, "params", params, group_sizes.shape, x.shape[1])
    arguments.function(name, "activation", activation)
    arguments.function(name, "grouped_matmul", grouped_matmul)

    def linear(x: Array, w: Array, bias: Array | None) -> Array:
        y = grouped_matmul(x, w.astype(x.dtype), group_sizes)
        shape = (x.shape[0], w.shape[2])
        y = arguments.array(name, "the result of grouped_matmul", y, shape)
        return y if bias is None else y + _of_each_row(bias.astype(x.dtype), local_expert)

    return _mlp(name, x, params, activation, linear)


def local_expert(group_sizes: Array, num_rows: int) -> Array:
    """int32 [N]: the local expert of each row of ``d.x``, and E / R past the last group.

    Example:
      >>> nn.local_expert(jnp.array([2, 0, 1]), num_rows=5)
      Array([0, 0, 2, 3, 3], dtype=int32)
    """
    name = "local_expert"
    group_sizes = arguments.array(name, "group_sizes", group_sizes, ("E / R",), jnp.integer)
    num_rows = arguments.integer(name, "num_rows", num_rows, least=0)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    ends_here = jnp.zeros(num_rows, jnp.int32).at[ends].add(jnp.int32(1), mode="drop")
    return jnp.cumsum(ends_here, dtype=jnp.int32)


def _mlp(
    where: str,
    x: Array,
    params: MlpParams,
    activation: Activation,
    linear: Callable[[Array, Array, Array | None], Array],
) -> Array:
    up = linear(x, params.up, params.up_bias)
    if params.gate is None:
        hidden = activation(up)
    else:
        hidden = activation(linear(x, params.gate, params.gate_bias), up)
    hidden = arguments.array(where, "the result of activation", hidden, up.shape, x.dtype)
    return linear(hidden, params.down, params.down_bias)


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
