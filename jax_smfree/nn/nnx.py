# SPDX-License-Identifier: Apache-2.0
"""The MoE layer as a module of Flax NNX. Needs ``pip install 'jax_smfree[flax]'``."""

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
    from flax import nnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"jax_smfree.nn.nnx: got an installation without {error.name!r}, expected Flax. Install it "
        "with: pip install 'jax_smfree[flax]'",
        name=error.name,
    ) from error


class BalanceBias(nnx.Variable[Array]):
    """float32 [E], added to the router's scores for the choice of experts. No optimizer's."""


class Parameters(nnx.Module):
    """A pytree of arrays as ``nnx.Param`` s, which have the names of its fields, as ``gate``."""

    def __init__(self, tree: Any) -> None:
        named, self._structure = jax.tree_util.tree_flatten_with_path(tree)
        paths = [jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in named]
        self._names = tuple(paths)
        for name, (_, leaf) in zip(paths, named, strict=True):
            setattr(self, name, nnx.Param(leaf))

    def values(self) -> Any:
        """The pytree, as the functions of `jax_smfree.nn` take it."""
        leaves = [getattr(self, name)[...] for name in self._names]
        return jax.tree.unflatten(self._structure, leaves)


class MoeLayer(nnx.Module):
    """`jax_smfree.nn.moe_layer_on_mesh` and its parameters.

    Shapes and sharding are those of that function; call it under ``nnx.jit``.
    Differentiation: ``nnx.grad``; gradients move as in `moe_layer`.

    The parameters are ``router``, ``router_bias``, ``experts`` and ``shared``. Experts that have
    others than an MLP take them from ``layer.experts = Parameters(tree)``.

    Args:
      group: the `EpGroup`; for training its config has ``differentiable=True``, the default.
      expert_width, shared_width, shared_gate, gated, biases: see `jax_smfree.nn.init_moe`.
      param_dtype, fsdp_axis, tensor_axis: see `jax_smfree.nn.init_moe_on_mesh`.
      balanced: whether the layer has a `BalanceBias`, for `update_balance`.
      rngs: its ``params`` stream makes the weights.
      options: the static arguments of `jax_smfree.nn.moe_layer`, `LayerOptions`.

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
        shared_gate: bool = False,
        gated: bool = True,
        biases: bool = False,
        param_dtype: DTypeLike | None = None,
        fsdp_axis: Axis | None = None,
        tensor_axis: Axis | None = None,
        balanced: bool = False,
        rngs: nnx.Rngs,
        **options: Unpack[LayerOptions],
    ) -> None:
        Layer("MoeLayer", group.config, **options)  # checks them
        self.group, self.fsdp_axis, self.tensor_axis = group, fsdp_axis, tensor_axis
        self._options = tuple(options.items())
        params = init_moe_on_mesh(
            rngs.params(),
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
        self.router = nnx.Param(params.router)
        self.router_bias = nnx.Param(params.router_bias) if biases else None
        self.experts = Parameters(params.experts)
        self.shared = Parameters(params.shared) if params.shared is not None else None
        self.balance_bias = BalanceBias(init_balance_bias_on_mesh(group)) if balanced else None

    def params(self) -> MoeParams:
        """As the functions of `jax_smfree.nn` take them."""
        return MoeParams(
            router=self.router[...],
            experts=self.experts.values(),
            shared=self.shared.values() if self.shared is not None else None,
            router_bias=self.router_bias[...] if self.router_bias is not None else None,
        )

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
            self.params(),
            x,
            token=token,
            lane=lane,
            routes=routes,
            mask=mask,
            balance_bias=self.balance_bias[...] if self.balance_bias is not None else None,
            fsdp_axis=self.fsdp_axis,
            tensor_axis=self.tensor_axis,
            **dict(self._options),
        )
        return result

    def update_balance(self, aux: MoeAux, rate: Array | float = 1e-3) -> None:
        """Once per step, with what the layer returned: lowers the bias of busy experts.

        Raises:
          ValueError: for a layer that was made without ``balanced=True``.
        """
        bias = modules.bias_of_balanced(self.balance_bias)
        bias[...] = update_balance_bias(bias[...], aux.load, rate)
