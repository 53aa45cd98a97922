# SPDX-License-Identifier: Apache-2.0
"""The MoE layer on global arrays, outside of ``jax.shard_map``: what modules are made of."""

import functools
from collections.abc import Callable
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_smfree._src import arguments
from jax_smfree._src.group import EpGroup
from jax_smfree._src.group_axis import Axis
from jax_smfree._src.placement import placed
from jax_smfree._src.token import Token
from jax_smfree.nn.layer import LayerOptions, MoeAux, moe_layer
from jax_smfree.nn.params import MoeParams, check_key, init_moe
from jax_smfree.nn.router import Routes
from jax_smfree.nn.rows import Rows
from jax_smfree.nn.specs import as_tuple, check_specs, gathered, moe_specs, once_over
from jax_smfree.nn.steps import Layer


def init_moe_on_mesh(
    key: Array,
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
) -> MoeParams:
    """`init_moe` with the sizes of the group, on its mesh as `moe_specs` says.

    Under ``jax.jit`` and ``jax.vmap`` too, which puts the axis of the layers first. Every device
    makes what it holds, so that a layer may be larger than a device.

    Args:
      key: a PRNG key.
      group: its config has H, E and the dtype.
      expert_width, shared_width, shared_gate, gated, biases: see `init_moe`.
      param_dtype: type of the experts' parameters, by default that of the group. The layer casts to
        the group's, so ``jnp.float32`` makes masters for an optimizer.
      fsdp_axis, tensor_axis: see `moe_specs`.

    Raises:
      ValueError, TypeError: as `init_moe` and `moe_specs`.

    Example:
      >>> params = nn.init_moe_on_mesh(jax.random.key(0), group, expert_width=32)
      >>> params.experts.gate.shape, params.experts.gate.sharding.spec
      ((8, 16, 32), P('ep',))
    """
    name = "init_moe_on_mesh"
    config = arguments.instance(name, "group", group, EpGroup).config
    check_key(name, key)
    dtype = config.dtype if param_dtype is None else param_dtype
    init = _init_on_mesh(
        group.mesh,
        group.axis,
        fsdp_axis,
        tensor_axis,
        hidden=config.hidden,
        num_experts=config.num_experts,
        expert_width=arguments.integer(name, "expert_width", expert_width),
        shared_width=arguments.integer(name, "shared_width", shared_width, least=0),
        shared_gate=arguments.flag(name, "shared_gate", shared_gate),
        gated=arguments.flag(name, "gated", gated),
        biases=arguments.flag(name, "biases", biases),
        dtype=arguments.dtype(name, "param_dtype", dtype),
    )
    return init(key)


@functools.lru_cache(maxsize=64)
def _init_on_mesh(
    mesh: Mesh, axis: Axis, fsdp_axis: Axis | None, tensor_axis: Axis | None, **sizes: Any
) -> Callable[[Array], MoeParams]:
    """`init_moe` as one program, which the layers of a model share."""

    def specs_of(params: MoeParams) -> MoeParams:
        return moe_specs(params, axis, fsdp_axis=fsdp_axis, tensor_axis=tensor_axis)

    def init(key: Array) -> MoeParams:
        params = init_moe(key, **sizes)
        return _placed(params, mesh, specs_of(params))

    shapes = jax.eval_shape(lambda: init_moe(jax.random.key(0), **sizes))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(shapes))
    compiled: Callable[[Array], MoeParams] = jax.jit(init, out_shardings=shardings)
    return compiled


def _placed(params: MoeParams, mesh: Mesh, specs: MoeParams) -> MoeParams:
    on_mesh: MoeParams = jax.tree.map(lambda v, spec: placed(v, mesh, spec), params, specs)
    return on_mesh


def init_balance_bias_on_mesh(group: EpGroup) -> Array:
    """The bias that `update_balance_bias` begins with: float32 [E], zero, on all devices.

    Raises:
      TypeError: for what is no group.

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
    routes: Routes | None = None,
    mask: Array | None = None,
    balance_bias: Array | None = None,
    params_spec: MoeParams | None = None,
    tensor_axis: Axis | None = None,
    **options: Unpack[LayerOptions],
) -> tuple[Array, MoeAux]: ...
@overload
def moe_layer_on_mesh(
    group: EpGroup,
    params: MoeParams,
    x: Array,
    *,
    token: Token,
    lane: int = 0,
    routes: Routes | None = None,
    mask: Array | None = None,
    balance_bias: Array | None = None,
    params_spec: MoeParams | None = None,
    tensor_axis: Axis | None = None,
    **options: Unpack[LayerOptions],
) -> tuple[Token, Array, MoeAux]: ...
def moe_layer_on_mesh(
    group: EpGroup,
    params: MoeParams,
    x: Array,
    *,
    token: Token | None = None,
    lane: int = 0,
    routes: Routes | None = None,
    mask: Array | None = None,
    balance_bias: Array | None = None,
    params_spec: MoeParams | None = None,
    tensor_axis: Axis | None = None,
    **options: Unpack[LayerOptions],
) -> tuple[Array, MoeAux] | tuple[Token, Array, MoeAux]:
    """`moe_layer` on global arrays: opens its own ``jax.shard_map``.

    Shapes: ``x`` [..., H] -> [..., H], as [B, S, H]. Its rows, in their order, are split over all
    axes of the group's mesh but ``tensor_axis``, at most ``config.max_tokens`` on each device. Any
    number of rows will do, also fewer than devices: what does not divide is filled up with rows
    that are masked.
    Sharding: ``params`` as ``params_spec`` says. On a mesh with explicit axes the output is of the
    sharding of ``x``. Call it under ``jax.jit``, outside of ``jax.shard_map``.
    Order: calls begin with fresh tokens, so nothing but their data orders them. A program may
    have any number of such calls side by side. On GPUs each operation in flight takes a set of
    buffers, see ``EpConfig.num_sets``; a ``token`` that is threaded through calls bounds these.
    Differentiation: of ``params`` and ``x``; gradients move as in `moe_layer`.

    Args:
      group: the `EpGroup`; for training its config has ``differentiable=True``, the default.
      params: those of the layer.
      x: the rows.
      token: a token of the group from outside of ``jax.shard_map``: the call begins after the one
        that returned it.
      lane: the lane of the fresh token that is taken where no ``token`` is given.
      routes: as of `moe_layer`, [..., K] and [..., E] for ``x`` [..., H].
      mask: as of `moe_layer`, [...] for ``x`` [..., H].
      balance_bias: float32 [E], see `update_balance_bias`.
      params_spec: the ``PartitionSpec`` of every parameter, by default that of `moe_specs`. What
        is split over further axes than the group's (FSDP) is gathered inside of the layer, MLPs in
        the dtype of the group, and their gradients are summed and scattered over those axes.
      tensor_axis: axes over which the parameters stay split, as ``params_spec`` says; rows are the
        same along them, and results are summed. Experts of your own must return values whose sum
        over these axes is the result.
      options: the static arguments of `moe_layer`, `LayerOptions`.

    Returns:
      ``(out, aux)``; ``aux`` is of all ranks: the mean loss of those with rows, and the sums of
      its counts. With ``token`` the next one as well: ``(token, out, aux)``.

    Raises:
      ValueError, TypeError: while tracing, for wrong shapes or dtypes, parameters of other sizes
        than the group's, a token of another group.

    Example:
      >>> params = nn.init_moe_on_mesh(jax.random.key(0), group, expert_width=32)
      >>> out, aux = jax.jit(nn.moe_layer_on_mesh, static_argnums=0)(group, params, x)
      >>> out.shape, aux.load.sum()  # 16 rows, two experts each
      ((16, 16), Array(32, dtype=int32))
    """
    name = "moe_layer_on_mesh"
    config = arguments.instance(name, "group", group, EpGroup).config
    arguments.instance(name, "params", params, MoeParams, "Make it with nn.init_moe_on_mesh.")
    if token is not None and arguments.instance(name, "token", token, Token).group is not group:
        raise ValueError(
            f"{name}: got a token of another group, expected one that began with group.token() of "
            "this one."
        )
    mesh, kept = group.mesh, as_tuple(tensor_axis)
    _check_axes(name, group, kept)
    axes = tuple(axis for axis in group.mesh_axes if axis not in kept)
    specs = moe_specs(params, group.axis) if params_spec is None else params_spec
    check_specs(name, specs, params)

    x = arguments.as_array(name, "x", x, f"an array [..., {config.hidden}]")
    if x.ndim < 2 or x.shape[-1] != config.hidden:
        raise ValueError(f"{name}: got x{list(x.shape)}, expected x[..., {config.hidden}].")
    rows, given = Rows(mesh, P(axes), x.shape[:-1]), x
    _check_rows(name, rows, routes, mask)
    x, routes, mask = jax.tree.map(rows.flat, (x, routes, rows.mask(mask)))
    layer = Layer(name, config, **options)
    layer.check(config.num_experts, params, x, routes, mask, balance_bias)

    def on_each_rank(
        token: Token | None,
        params: MoeParams,
        bias: Array | None,
        x: Array,
        routes: Routes | None,
        mask: Array | None,
    ) -> tuple[Token | None, Array, MoeAux]:
        params = gathered(params, specs, group.axis, kept, config.dtype)
        next_token, out, aux = moe_layer(
            group.token(lane) if token is None else token,
            once_over(params, kept),
            x,
            routes=routes,
            mask=mask,
            balance_bias=bias,
            **options,
        )
        if kept:
            out = jax.lax.psum(out, kept)
        busy = jax.lax.psum(jnp.any(aux.load > 0).astype(jnp.float32), axes)
        of_all = MoeAux(
            load_balancing_loss=jax.lax.psum(aux.load_balancing_loss, axes) / jnp.maximum(busy, 1),
            load=jax.lax.psum(aux.load, axes),
            num_dropped=jax.lax.psum(aux.num_dropped, axes),
        )
        return None if token is None else next_token, out, of_all

    sharded = jax.shard_map(
        on_each_rank,
        mesh=mesh,
        in_specs=(group.token_spec, specs, P(), P(axes), P(axes), P(axes)),
        out_specs=(group.token_spec, P(axes), P()),
    )
    if balance_bias is not None:
        balance_bias = placed(balance_bias, mesh, P())
    next_token, out, aux = sharded(
        token, _placed(params, mesh, specs), balance_bias, x, routes, mask
    )
    out = rows.as_given(out, given)
    return (out, aux) if next_token is None else (next_token, out, aux)


def _check_axes(where: str, group: EpGroup, kept: tuple[str, ...]) -> None:
    """``kept`` are axes of the mesh beside the group's."""
    others = [axis for axis in group.mesh_axes if axis not in as_tuple(group.axis)]
    if any(axis not in others for axis in kept):
        raise ValueError(
            f"{where}: got tensor_axis={arguments.shown(kept)}, expected axes of the mesh beside "
            f"the group's, which are {others}."
        )


def _check_rows(where: str, rows: Rows, routes: Routes | None, mask: Array | None) -> None:
    """What comes with ``x`` is of its rows."""
    given = {} if routes is None else arguments.instance(where, "routes", routes, Routes)._asdict()
    shapes = {f"routes.{field}": (*rows.shape, "K" if "topk" in field else "E") for field in given}
    values = {f"routes.{field}": value for field, value in given.items()}
    if mask is not None:
        shapes["mask"], values["mask"] = rows.shape, mask
    for name, shape in shapes.items():
        kind = np.bool_ if name == "mask" else jnp.number
        arguments.array(where, name, values[name], shape, kind)
