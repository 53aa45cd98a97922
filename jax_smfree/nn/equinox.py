# SPDX-License-Identifier: Apache-2.0
"""The MoE layer as a module of Equinox. Needs ``pip install 'jax_smfree[equinox]'``."""

from __future__ import annotations

from typing import overload

import jax
from jax import Array

from jax_smfree._src.group import EpGroup
from jax_smfree._src.token import Token
from jax_smfree.nn import matmul
from jax_smfree.nn.balance import update_balance_bias
from jax_smfree.nn.layer import MoeAux
from jax_smfree.nn.on_mesh import (
    bias_of_balanced,
    init_balance_bias_on_mesh,
    init_moe_on_mesh,
    moe_layer_on_mesh,
)
from jax_smfree.nn.params import MoeParams

try:
    import equinox
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"jax_smfree.nn.equinox: got an installation without {error.name!r}, expected Equinox. "
        "Install it with: pip install 'jax_smfree[equinox]'",
        name=error.name,
    ) from error


class MoeLayer(equinox.Module):
    """`jax_smfree.nn.moe_layer_on_mesh` and its parameters.

    Shapes, sharding and differentiation are those of that function. The gradient of
    ``balance_bias`` is zero; an optimizer that changes a parameter without a gradient, as weight
    decay does, must not get it (``equinox.partition``).

    Args:
      group: of ``EpConfig`` with ``differentiable=True`` for training.
      expert_width: F of a routed expert.
      shared_width: F of the shared expert; 0 leaves it out.
      balanced: whether the layer has a bias for `update_balance`.
      grouped_matmul: multiplies groups of rows with their experts.
      key: a PRNG key for the weights.

    Example:
      >>> layer = MoeLayer(group, expert_width=64, shared_width=64, key=jax.random.key(0))
      >>> out, aux = equinox.filter_jit(layer)(x)
      >>> out.block_until_ready().shape == x.shape
      True
    """

    params: MoeParams
    balance_bias: Array | None
    group: EpGroup = equinox.field(static=True)
    grouped_matmul: matmul.GroupedMatmul = equinox.field(static=True)

    def __init__(
        self,
        group: EpGroup,
        *,
        expert_width: int,
        shared_width: int = 0,
        balanced: bool = False,
        grouped_matmul: matmul.GroupedMatmul = matmul.grouped_matmul,
        key: Array,
    ) -> None:
        self.group, self.grouped_matmul = group, grouped_matmul
        self.params = init_moe_on_mesh(
            key, group, expert_width=expert_width, shared_width=shared_width
        )
        self.balance_bias = init_balance_bias_on_mesh(group) if balanced else None

    @overload
    def __call__(self, x: Array, *, token: None = None, lane: int = 0) -> tuple[Array, MoeAux]: ...
    @overload
    def __call__(self, x: Array, *, token: Token, lane: int = 0) -> tuple[Token, Array, MoeAux]: ...
    def __call__(
        self, x: Array, *, token: Token | None = None, lane: int = 0
    ) -> tuple[Array, MoeAux] | tuple[Token, Array, MoeAux]:
        """``(out, aux)``, or ``(token, out, aux)`` with a token; see `moe_layer_on_mesh`."""
        return moe_layer_on_mesh(
            self.group,
            self.params,
            x,
            token=token,
            lane=lane,
            balance_bias=jax.lax.stop_gradient(self.balance_bias),
            grouped_matmul=self.grouped_matmul,
        )

    def update_balance(self, aux: MoeAux, rate: float = 1e-3) -> MoeLayer:
        """Once per step, with what the layer returned: a layer with less bias for busy experts.

        Raises:
          ValueError: for a layer that was made without ``balanced=True``.
        """
        bias = update_balance_bias(bias_of_balanced(self.balance_bias), aux.load, rate)
        updated: MoeLayer = equinox.tree_at(lambda layer: layer.balance_bias, self, bias)
        return updated
