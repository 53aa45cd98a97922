# SPDX-License-Identifier: Apache-2.0
"""The MoE layer as a module of Flax NNX. Needs ``pip install 'jax_smfree[flax]'``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_smfree._src.group import EpGroup
from jax_smfree.nn.layer import MoeAux, moe_layer
from jax_smfree.nn.matmul import GroupedMatmul, grouped_matmul
from jax_smfree.nn.params import MoeParams, SwigluParams, init_moe, moe_specs
from jax_smfree.nn.router import update_balance_bias

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
    """`jax_smfree.nn.moe_layer` on global arrays: it opens its own ``jax.shard_map``.

    Shapes: ``x`` [R * T, H] -> [R * T, H], rows split over all axes of the group's mesh; T at most
    ``config.max_tokens``.
    Sharding: parameters are put on the group's mesh when the layer is made, experts split over its
    axis. Call it under ``nnx.jit``, outside of ``jax.shard_map``; layers of one model must be
    ordered by their data, as in a stack.
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
      >>> out.shape == x.shape
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
        config = group.config
        params = init_moe(
            rngs.params(),
            hidden=config.hidden,
            num_experts=config.num_experts,
            expert_width=expert_width,
            shared_width=shared_width,
            dtype=config.dtype,
        )
        params = jax.tree.map(self._put, params, moe_specs(params, group.axis))
        self.router = nnx.Param(params.router)
        self.experts = Swiglu(params.experts)
        self.shared = Swiglu(params.shared) if params.shared is not None else None
        bias = self._put(jnp.zeros(config.num_experts, jnp.float32), P())
        self.balance_bias = BalanceBias(bias) if balanced else None

    def _put(self, value: Array, spec: P) -> Array:
        placed: Array = jax.device_put(value, NamedSharding(self.group.mesh, spec))
        return placed

    def __call__(self, x: Array) -> tuple[Array, MoeAux]:
        """``(out, aux)``; ``aux`` is of all ranks: the mean loss, and the sums of its counts."""
        shared = self.shared.values() if self.shared is not None else None
        params = MoeParams(self.router[...], self.experts.values(), shared)
        bias = self.balance_bias[...] if self.balance_bias is not None else None
        axes = self.group.mesh_axes

        def on_each_rank(params: MoeParams, bias: Array | None, x: Array) -> tuple[Array, MoeAux]:
            _, out, aux = moe_layer(
                self.group.token(),
                params,
                x,
                balance_bias=bias,
                grouped_matmul=self.grouped_matmul,
            )
            return out, MoeAux(
                load_balancing_loss=jax.lax.pmean(aux.load_balancing_loss, axes),
                load=jax.lax.psum(aux.load, axes),
                num_dropped=jax.lax.psum(aux.num_dropped, axes),
            )

        rows = P(axes)
        sharded = jax.shard_map(
            on_each_rank,
            mesh=self.group.mesh,
            in_specs=(moe_specs(params, self.group.axis), P(), rows),
            out_specs=(rows, P()),
        )
        out, aux = sharded(params, bias, x)
        return out, aux

    def update_balance(self, aux: MoeAux, rate: float = 1e-3) -> None:
        """Once per step, with what the layer returned: lowers the bias of busy experts.

        Raises:
          ValueError: for a layer that was made without ``balanced=True``.
        """
        if self.balance_bias is None:
            raise ValueError(
                "MoeLayer.update_balance: got a layer without a bias, expected one that was made "
                "with balanced=True."
            )
        self.balance_bias[...] = update_balance_bias(self.balance_bias[...], aux.load, rate)
