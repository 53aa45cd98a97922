# SPDX-License-Identifier: Apache-2.0
"""The MoE layer as a module of Equinox. Needs ``pip install 'jax_smfree[equinox]'``."""

from __future__ import annotations

from typing import Any, Unpack, overload

import jax
from jax import Array
from jax.typing import DTypeLike

from jax_smfree._src.group import EpGroup
from jax_smfree._src.group_axis import Axis
from jax_smfree._src.token import Token
from jax_smfree.nn import modules
from jax_smfree.nn.balance import update_balance_bias
from jax_smfree.nn.layer import LayerOptions, MoeAux
from jax_smfree.nn.on_mesh import init_balance_bias_on_mesh, init_moe_on_mesh
from jax_smfree.nn.params import MoeParams
from jax_smfree.nn.router import Routes
from jax_smfree.nn.steps import Layer

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

    Experts that have other parameters than an MLP take them in ``layer.params.experts``, which
    ``equinox.tree_at`` replaces.

    Args:
      group: the `EpGroup`; for training its config has ``differentiable=True``, the default.
      expert_width, shared_width, shared_gate, gated, biases: see `jax_smfree.nn.init_moe`.
      param_dtype, fsdp_axis, tensor_axis: see `jax_smfree.nn.init_moe_on_mesh`.
      balanced: whether the layer has a bias for `update_balance`.
      key: a PRNG key for the weights.
      options: the static arguments of `jax_smfree.nn.moe_layer`, `LayerOptions`.

    Example:
      >>> layer = MoeLayer(group, expert_width=64, shared_width=64, key=jax.random.key(0))
      >>> out, aux = equinox.filter_jit(layer)(x)
      >>> out.block_until_ready().shape == x.shape
      True
    """

    params: MoeParams
    balance_bias: Array | None
    group: EpGroup = equinox.field(static=True)
    fsdp_axis: Axis | None = equinox.field(static=True)
    tensor_axis: Axis | None = equinox.field(static=True)
    options: tuple[tuple[str, Any], ...] = equinox.field(static=True)

    def __init__(
        self,
        group: EpGroup,
        *,
        expert_width: int,
        shared_width: int = 0,
        shared_gate: bool = False,
        gated: bool = True,
        biases: bool = False,
        param_dtype: DTypeLike | None = None,
        fsdp_axis: Axis | None = None,
        tensor_axis: Axis | None = None,
        balanced: bool = False,
        key: Array,
        **options: Unpack[LayerOptions],
    ) -> None:
        Layer("MoeLayer", group.config, **options)  # checks them
        self.group, self.fsdp_axis, self.tensor_axis = group, fsdp_axis, tensor_axis
        self.options = tuple(options.items())
        self.params = init_moe_on_mesh(
            key,
            group,
            expert_width=expert_width,
            shared_width=shared_width,
            shared_gate=shared_gate,
            gated=gated,
            biases=biases,
            param_dtype=param_dtype,
            fsdp_axis=fsdp_axis,
            tensor_axis=tensor_axis,
        )
        self.balance_bias = init_balance_bias_on_mesh(group) if balanced else None

    @overload
    def __call__(
        self,
        x: Array,
        *,
        token: None = None,
        lane: int = 0,
        routes: Routes | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, MoeAux]: ...
    @overload
    def __call__(
        self,
        x: Array,
        *,
        token: Token,
        lane: int = 0,
        routes: Routes | None = None,
        mask: Array | None = None,
    ) -> tuple[Token, Array, MoeAux]: ...
    def __call__(
        self,
        x: Array,
        *,
        token: Token | None = None,
        lane: int = 0,
        routes: Routes | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, MoeAux] | tuple[Token, Array, MoeAux]:
        """``(out, aux)``, or ``(token, out, aux)`` with a token; see `moe_layer_on_mesh`."""
        result: tuple[Array, MoeAux] | tuple[Token, Array, MoeAux] = modules.call(
            self.group,
            self.params,
            x,
            token=token,
            lane=lane,
            routes=routes,
            mask=mask,
            balance_bias=jax.lax.stop_gradient(self.balance_bias),
            fsdp_axis=self.fsdp_axis,
            tensor_axis=self.tensor_axis,
            **dict(self.options),
        )
        return result

    def update_balance(self, aux: MoeAux, rate: Array | float = 1e-3) -> MoeLayer:
        """Once per step, with what the layer returned: a layer with less bias for busy experts.

        Raises:
          ValueError: for a layer that was made without ``balanced=True``.
        """
        bias = update_balance_bias(modules.bias_of_balanced(self.balance_bias), aux.load, rate)
        updated: MoeLayer = equinox.tree_at(lambda layer: layer.balance_bias, self, bias)
        return updated
