# SPDX-License-Identifier: Apache-2.0
"""The shared expert, which every row visits: an MLP, with or without a gate of its own.

A layer takes it as a function, `Shared`. It runs while the rows move: those here but for their last
matmul while they move to the experts, and that while the results come back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from jax_smfree._src import arguments
from jax_smfree.nn.activations import Activation, swiglu
from jax_smfree.nn.experts import (
    FirstParams,
    before_last,
    first_and_last,
    of_partial,
    one_by_one,
)
from jax_smfree.nn.params import MlpParams, SigmoidGatedParams, check_mlp

# (x [T, H], params) -> [T, H]. ``params`` is ``MoeParams.shared``, any pytree of arrays.
Shared = Callable[[Array, Any], Array]


class Part(NamedTuple):
    """One part of a shared expert: ``function(x, params)``; x is what the part before returned."""

    function: Callable[[Any, Any], Any]
    params: Any


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
    return _whole(_mlp_in_two(x.shape[1], params, activation), x)


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
    x = arguments.array("sigmoid_gated_mlp", "x", x, ("T", "H"))
    return _whole(_gated_in_two(x.shape[1], params, activation), x)


def in_two(shared: Shared, x: Array, params: Any) -> tuple[Part, Part] | None:
    """The parts of a ready shared expert, whose second one is the last matmul; else None.

    That can wait for the combine, whose rows it hides, and in the backward pass the gradients that
    are dispatched. No parameter is in both parts, so that no gradients have to be added.
    """
    function, given = of_partial(shared)
    options = {"activation": swiglu} | given
    if function is mlp:
        return _mlp_in_two(x.shape[1], params, **options)
    if function is sigmoid_gated_mlp:
        return _gated_in_two(x.shape[1], params, **options)
    return None


def _mlp_in_two(hidden: int, params: MlpParams, activation: Activation) -> tuple[Part, Part]:
    check_mlp("mlp", "params", params, (), hidden)
    arguments.function("mlp", "activation", activation)
    first, last = first_and_last(params)

    def begin(x: Array, first: FirstParams) -> Array:  # [T, F]
        return before_last("mlp", x, first, activation, one_by_one(_linear))

    return Part(begin, first), Part(lambda hidden, last: _linear(hidden, *last), last)


def _gated_in_two(
    hidden: int, params: SigmoidGatedParams, activation: Activation
) -> tuple[Part, Part]:
    name = "sigmoid_gated_mlp"
    cure = "Make it with nn.init_moe(..., shared_gate=True)."
    arguments.instance(name, "params", params, SigmoidGatedParams, cure)
    gate = arguments.array(name, "params.gate", params.gate, (hidden,))
    first, last = _mlp_in_two(hidden, params.mlp, activation)

    def begin(x: Array, params: Any) -> Any:
        gate, of_mlp = params
        return jax.nn.sigmoid(x @ gate.astype(x.dtype)), first.function(x, of_mlp)

    def end(begun: Any, params: Any) -> Array:
        weight, hidden = begun
        y: Array = last.function(hidden, params)
        out: Array = weight[:, None] * y
        return out

    return Part(begin, (gate, first.params)), Part(end, last.params)


def _whole(parts: tuple[Part, Part], x: Array) -> Array:
    result: Any = x
    for part in parts:
        result = part.function(result, part.params)
    out: Array = result
    return out


def _linear(x: Array, w: Array, bias: Array | None) -> Array:
    y = x @ w.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)[None, :]
