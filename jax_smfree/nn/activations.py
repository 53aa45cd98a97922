# SPDX-License-Identifier: Apache-2.0
"""What stands between the two matmuls of an expert.

An activation is a function of the results of the first matmul: ``activation(gate, up)`` where the
expert has a gate (a gated linear unit; Shazeer, 2020, arXiv:2002.05202), ``activation(up)`` where
it has none. All of them are elementwise and keep shape and dtype.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

# (gate, up) -> hidden, or (up) -> hidden; all [..., F].
Activation = Callable[..., Array]


def swiglu(gate: Array, up: Array) -> Array:
    """``silu(gate) * up``: Mixtral, Qwen, DeepSeek, Llama 4, OLMoE, GLM.

    Example:
      >>> nn.swiglu(jnp.zeros(2), jnp.ones(2))
      Array([0., 0.], dtype=float32)
    """
    return jax.nn.silu(gate) * up


def geglu(gate: Array, up: Array, *, approximate: bool = True) -> Array:
    """``gelu(gate) * up``, by default with the tanh approximation of GELU, as Gemma has it.

    Example:
      >>> nn.geglu(jnp.zeros(2), jnp.ones(2))
      Array([0., 0.], dtype=float32)
    """
    return jax.nn.gelu(gate, approximate=approximate) * up


def clamped_swiglu(
    gate: Array, up: Array, *, alpha: float = 1.702, limit: float = 7.0, offset: float = 1.0
) -> Array:
    """``g * sigmoid(alpha * g) * (u + offset)`` of clamped ``g`` and ``u``, as in gpt-oss.

    ``g`` is ``gate``, at most ``limit``; ``u`` is ``up`` between ``-limit`` and ``limit``. The
    defaults are those of gpt-oss (arXiv:2508.10925). Bind others with ``functools.partial``.

    Example:
      >>> nn.clamped_swiglu(jnp.array([0.0, 100.0]), jnp.array([0.0, 100.0])).round(2)
      Array([ 0., 56.], dtype=float32)
    """
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + offset)


def relu_squared(up: Array) -> Array:
    """``relu(up) ** 2``, of experts without a gate (So et al., 2021, arXiv:2109.08668): Nemotron-H.

    Example:
      >>> nn.relu_squared(jnp.array([-3.0, 3.0]))
      Array([0., 9.], dtype=float32)
    """
    return jnp.square(jax.nn.relu(up))
