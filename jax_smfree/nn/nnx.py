# SPDX-License-Identifier: Apache-2.0
"""The MoE layer as a module of Flax NNX. Needs ``pip install 'jax_smfree[flax]'``."""

from __future__ import annotations

from typing import overload

from jax import Array

from jax_smfree._src.group import EpGroup
from jax_smfree._src.token import Token
from jax_smfree.nn.balance import update_balance_bias
from jax_smfree.nn.layer import MoeAux
from jax_smfree.nn.matmul import GroupedMatmul, grouped_matmul
from jax_smfree.nn.on_mesh import (
    bias_of_balanced,
    init_balance_bias_on_mesh,
    init_moe_on_mesh,
    moe_layer_on_mesh,
)
from jax_smfree.nn.params import MoeParams, SwigluParams

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"jax_smfree.nn.nnx: got an installation without {error.name!r}, expected Flax. Install it "
        "with: pip install 'jax_smfree[flax]'",
        name=error.name,
    ) from error


class BalanceBias(nnx.Variable[Array]):
    """float32 [E], added to the router's scores for the choice of experts. No optimizer's."""


class Swiglu(nnx.Module):
    """Parameters of `SwigluParams`."""

    def __init__(self, params: SwigluParams) -> None:
        self.gate = nnx.Param(params.gate)
        self.up = nnx.Param(params.up)
        self.down = nnx.Param(params.down)

    def values(self) -> SwigluParams:
        """As the functions of `jax_smfree.nn` take them."""
        return SwigluParams(self.gate[...], self.up[...], self.down[...])


class MoeLayer(nnx.Module):
    """`jax_smfree.nn.moe_layer_on_mesh` and its parameters.

    Shapes and sharding are those of that function; call it under ``nnx.jit``.
    Differentiation: ``nnx.grad``; gradients move under the backward pass of the shared expert.

    Args:
      group: of ``EpConfig`` with ``differentiable=True`` for training.
      expert_width: F of a routed expert.
      shared_width: F of the shared expert; 0 leaves it out.
      balanced: whether the layer has a `BalanceBias`, for `update_balance`.
      grouped_matmul: multiplies groups of rows with their experts.
      rngs: its ``params`` stream makes the weights.

    Example:
      >>> layer = MoeLayer(group, expert_width=64, shared_width=64, rngs=nnx.Rngs(0))
      >>> out, aux = nnx.jit(lambda layer, x: layer(x))(layer, x)
      >>> out.block_until_ready().shape == x.shape
      True
    """

    def __init__(
        self,
        group: EpGroup,
        *,
        expert_width: int,
        shared_width: int = 0,
        balanced: bool = False,
        grouped_matmul: GroupedMatmul = grouped_matmul,
        rngs: nnx.Rngs,
    ) -> None:
        self.group, self.grouped_matmul = group, grouped_matmul
        params = init_moe_on_mesh(
            rngs.params(), group, expert_width=expert_width, shared_width=shared_width
        )
        self.router = nnx.Param(params.router)
        self.experts = Swiglu(params.experts)
        self.shared = Swiglu(params.shared) if params.shared is not None else None
        self.balance_bias = BalanceBias(init_balance_bias_on_mesh(group)) if balanced else None

    @overload
    def __call__(self, x: Array, *, token: None = None, lane: int = 0) -> tuple[Array, MoeAux]: ...
    @overload
    def __call__(self, x: Array, *, token: Token, lane: int = 0) -> tuple[Token, Array, MoeAux]: ...
    def __call__(
        self, x: Array, *, token: Token | None = None, lane: int = 0
    ) -> tuple[Array, MoeAux] | tuple[Token, Array, MoeAux]:
        """``(out, aux)``, or ``(token, out, aux)`` with a token; see `moe_layer_on_mesh`."""
        shared = self.shared.values() if self.shared is not None else None
        return moe_layer_on_mesh(
            self.group,
            MoeParams(self.router[...], self.experts.values(), shared),
            x,
            token=token,
            lane=lane,
            balance_bias=self.balance_bias[...] if self.balance_bias is not None else None,
            grouped_matmul=self.grouped_matmul,
        )

    def update_balance(self, aux: MoeAux, rate: float = 1e-3) -> None:
        """Once per step, with what the layer returned: lowers the bias of busy experts.

        Raises:
          ValueError: for a layer that was made without ``balanced=True``.
        """
        bias = bias_of_balanced(self.balance_bias)
        bias[...] = update_balance_bias(bias[...], aux.load, rate)
