# SPDX-License-Identifier: Apache-2.0
"""The MoE layer on global arrays, outside of ``jax.shard_map``: what modules are made of."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_smfree._src import arguments
from jax_smfree._src.group import EpGroup
from jax_smfree._src.group_axis import Axis
from jax_smfree._src.placement import placed
from jax_smfree._src.token import Token
from jax_smfree.nn.layer import MoeAux, check_layer, moe_layer
from jax_smfree.nn.matmul import GroupedMatmul, grouped_matmul
from jax_smfree.nn.params import MoeParams, check_key, init_moe, moe_specs

_Bias = TypeVar("_Bias")


def init_moe_on_mesh(
    key: Array, group: EpGroup, *, expert_width: int, shared_width: int = 0
) -> MoeParams:
    """`init_moe` with the sizes and the dtype of the group, on its mesh as `moe_specs` says.

    Under ``jax.jit`` and ``jax.vmap`` too, which puts the axis of the layers first. Every device
    makes what it holds, so that a layer may be larger than a device.

    Args:
      key: a PRNG key.
      group: its config has H, E and the dtype.
      expert_width: F of a routed expert.
      shared_width: F of the shared expert; 0 leaves it out.

    Example:
      >>> params = nn.init_moe_on_mesh(jax.random.key(0), group, expert_width=32)
      >>> params.experts.gate.shape, params.experts.gate.sharding.spec
      ((8, 16, 32), P('ep',))
    """
    name = "init_moe_on_mesh"
    config = arguments.instance(name, "group", group, EpGroup).config
    check_key(name, key)
    expert_width = arguments.integer(name, "expert_width", expert_width)
    shared_width = arguments.integer(name, "shared_width", shared_width, least=0)
    init = _init_on_mesh(
        group.mesh,
        group.axis,
        hidden=config.hidden,
        num_experts=config.num_experts,
        expert_width=expert_width,
        shared_width=shared_width,
        dtype=config.dtype,
    )
    return init(key)


@functools.lru_cache(maxsize=64)
def _init_on_mesh(mesh: Mesh, axis: Axis, **sizes: Any) -> Callable[[Array], MoeParams]:
    """`init_moe` as one program, which the layers of a model share."""

    def init(key: Array) -> MoeParams:
        params = init_moe(key, **sizes)
        return _placed(params, mesh, moe_specs(params, axis))

    specs = moe_specs(jax.eval_shape(lambda: init(jax.random.key(0))), axis)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    compiled: Callable[[Array], MoeParams] = jax.jit(init, out_shardings=shardings)
    return compiled


def _placed(params: MoeParams, mesh: Mesh, specs: MoeParams) -> MoeParams:
    on_mesh: MoeParams = jax.tree.map(lambda v, spec: placed(v, mesh, spec), params, specs)
    return on_mesh


def init_balance_bias_on_mesh(group: EpGroup) -> Array:
    """The bias that `update_balance_bias` begins with: float32 [E], zero, on all devices.

    Example:
      >>> nn.init_balance_bias_on_mesh(group)
      Array([0., 0., 0., 0., 0., 0., 0., 0.], dtype=float32)
    """
    arguments.instance("init_balance_bias_on_mesh", "group", group, EpGroup)
    everywhere = NamedSharding(group.mesh, P())
    return jnp.zeros(group.config.num_experts, jnp.float32, device=everywhere)


@overload
def moe_layer_on_mesh(
    group: EpGroup,
    params: MoeParams,
    x: Array,
    *,
    token: None = None,
    lane: int = 0,
    balance_bias: Array | None = None,
    grouped_matmul: GroupedMatmul = grouped_matmul,
) -> tuple[Array, MoeAux]: ...
@overload
def moe_layer_on_mesh(
    group: EpGroup,
    params: MoeParams,
    x: Array,
    *,
    token: Token,
    lane: int = 0,
    balance_bias: Array | None = None,
    grouped_matmul: GroupedMatmul = grouped_matmul,
) -> tuple[Token, Array, MoeAux]: ...
def moe_layer_on_mesh(
    group: EpGroup,
    params: MoeParams,
    x: Array,
    *,
    token: Token | None = None,
    lane: int = 0,
    balance_bias: Array | None = None,
    grouped_matmul: GroupedMatmul = grouped_matmul,
) -> tuple[Array, MoeAux] | tuple[Token, Array, MoeAux]:
    """`moe_layer` on global arrays: opens its own ``jax.shard_map``.

    Shapes: ``x`` [R * T, H] -> [R * T, H], rows split over all axes of the group's mesh; T at most
    ``config.max_tokens``.
    Sharding: ``params`` as by `init_moe_on_mesh`. On a mesh with explicit axes the output is of the
    sharding of ``x``. Call it under ``jax.jit``, outside of ``jax.shard_map``.
    Order: calls begin with fresh tokens, so nothing but their data orders them. On CPUs a program
    may have any number of such calls side by side; on GPUs those of one lane must be ordered by
    their data, as layers in a stack are, or by a ``token`` that is threaded through them.
    Differentiation: of ``params`` and ``x``; gradients move under the backward pass of the shared
    expert.

    Args:
      group: of ``EpConfig`` with ``differentiable=True`` for training.
      params: of the layer.
      x: the rows.
      token: of the group, made outside of ``jax.shard_map``: the call begins after the one that
        returned it.
      lane: of the fresh token, without ``token``.
      balance_bias: float32 [E], see `update_balance_bias`.
      grouped_matmul: multiplies groups of rows with their experts.

    Returns:
      ``(out, aux)``; ``aux`` is of all ranks: the mean loss, and the sums of its counts. With
      ``token`` the next one as well: ``(token, out, aux)``.

    Raises:
      ValueError, TypeError: while tracing, for wrong shapes or dtypes, parameters of other sizes
        than the group's, rows that do not divide over the devices, a token of another group.

    Example:
      >>> params = nn.init_moe_on_mesh(jax.random.key(0), group, expert_width=32)
      >>> out, aux = jax.jit(nn.moe_layer_on_mesh, static_argnums=0)(group, params, x)
      >>> out.shape, aux.load.sum()  # 16 rows, two experts each
      ((16, 16), Array(32, dtype=int32))
    """
    name = "moe_layer_on_mesh"
    config = arguments.instance(name, "group", group, EpGroup).config
    check_layer(name, config, config.num_experts, params, x, balance_bias, grouped_matmul)
    if x.shape[0] % group.mesh.size:
        raise ValueError(
            f"{name}: got x{list(x.shape)}, expected a multiple of {group.mesh.size} rows: they "
            "are split over all devices of the mesh."
        )
    if token is not None and arguments.instance(name, "token", token, Token).group is not group:
        raise ValueError(
            f"{name}: got a token of another group, expected one that began with group.token() of "
            "this one."
        )
    axes = group.mesh_axes

    def on_each_rank(
        token: Token | None, params: MoeParams, bias: Array | None, x: Array
    ) -> tuple[Token | None, Array, MoeAux]:
        next_token, out, aux = moe_layer(
            group.token(lane) if token is None else token,
            params,
            x,
            balance_bias=bias,
            grouped_matmul=grouped_matmul,
        )
        of_all = MoeAux(
            load_balancing_loss=jax.lax.pmean(aux.load_balancing_loss, axes),
            load=jax.lax.psum(aux.load, axes),
            num_dropped=jax.lax.psum(aux.num_dropped, axes),
        )
        return None if token is None else next_token, out, of_all

    mesh, rows, specs = group.mesh, P(axes), moe_specs(params, group.axis)
    sharded = jax.shard_map(
        on_each_rank,
        mesh=mesh,
        in_specs=(group.token_spec, specs, P(), rows),
        out_specs=(group.token_spec, rows, P()),
    )
    if balance_bias is not None:
        balance_bias = placed(balance_bias, mesh, P())
    next_token, out, aux = sharded(
        token, _placed(params, mesh, specs), balance_bias, placed(x, mesh, rows)
    )
    out = placed(out, mesh, jax.typeof(x).sharding.spec)
    return (out, aux) if next_token is None else (next_token, out, aux)


def bias_of_balanced(bias: _Bias | None) -> _Bias:
    """The bias of a module's ``MoeLayer`` that is to be updated, which has to have one."""
    if bias is None:
        raise ValueError(
            "MoeLayer.update_balance: got a layer without a bias, expected one that was made "
            "with balanced=True."
        )
    return bias
