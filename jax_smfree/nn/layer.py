# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import SequenceKey

from jax_smfree._src import arguments, compat, group_axis
from jax_smfree._src.config import EpConfig
from jax_smfree.nn import operations
from jax_smfree.nn.balance import expert_load, load_balancing_loss
from jax_smfree.nn.experts import Experts, Shared, grouped_mlp, local_expert, mlp
from jax_smfree.nn.matmul import GroupedMatmul
from jax_smfree.nn.operations import Implementation
from jax_smfree.nn.params import MoeParams
from jax_smfree.nn.physical import ExpertPlacement, spread
from jax_smfree.nn.router import RouterConfig, Routes, route

WeightOn = Literal["output", "input"]


class LayerOptions(TypedDict, total=False):
    """The static arguments of `moe_layer`, which all forms of the layer take."""

    router: RouterConfig | None
    placement: ExpertPlacement | None
    experts: Experts
    shared: Shared
    weight_on: WeightOn
    grouped_matmul: GroupedMatmul | None
    implementation: Implementation


class MoeAux(NamedTuple):
    """What a layer tells beside its output, of the rows of this rank (no communication)."""

    load_balancing_loss: Array  # float32 []
    load: Array  # int32 [E], rows that this rank sends to each expert
    num_dropped: Array  # int32 [], copies that did not fit into this rank's recv_capacity

    @classmethod
    def of(cls, routes: Routes, num_dropped: Array) -> "MoeAux":
        load = expert_load(routes.topk_idx, num_experts=routes.probabilities.shape[1])
        return cls(load_balancing_loss(routes), load, num_dropped[0])


# Positions as keys: flax.nnx.tabulate takes no other pytree inside of a tuple.
jax.tree_util.register_pytree_with_keys(
    MoeAux,
    lambda aux: ([(SequenceKey(i), value) for i, value in enumerate(aux)], None),
    lambda _, values: MoeAux(*values),
    lambda aux: (tuple(aux), None),
)


def moe_layer(
    token: Any,
    params: MoeParams,
    x: Array,
    *,
    router: RouterConfig | None = None,
    routes: Routes | None = None,
    mask: Array | None = None,
    balance_bias: Array | None = None,
    placement: ExpertPlacement | None = None,
    experts: Experts = grouped_mlp,
    shared: Shared = mlp,
    weight_on: WeightOn = "output",
    grouped_matmul: GroupedMatmul | None = None,
    implementation: Implementation = "smfree",
) -> tuple[Any, Array, MoeAux]:
    """Routed experts plus, if there is one, the shared expert, which runs while the rows move.

    Shapes: ``x`` [T, H] -> [T, H]; sizes as in the ``EpConfig`` of the token's group.
    Sharding: to be called inside ``jax.shard_map``, manual over the group's mesh. ``x`` is this
    rank's rows and ``params.experts`` this rank's experts; the other parameters and
    ``balance_bias`` are replicated (`moe_specs`).
    Differentiation: of everything but ``balance_bias`` and the choice of experts. In the backward
    pass the gradient of the shared expert is computed while the gradients of the rows move.

    Args:
      token: ready, on any lane.
      params: from `init_moe`, or with what ``experts`` and ``shared`` take.
      x: the rows, in the dtype of the group.
      router: how scores become a choice and weights. The default is a softmax over all experts,
        with weights that sum to 1 if ``top_k > 1``.
      routes: in place of the router: recorded ones, a hash, a forced balance. Where ``topk_idx``
        is -1, no expert is visited.
      mask: bool [T]; rows that are False (padding) visit no expert and come out as zero, and what
        is in them reaches nothing, NaN included.
      balance_bias: float32 [E], see `update_balance_bias`.
      placement: of redundant copies of experts, where ``config.num_experts`` counts the copies
        and ``params.experts`` are those (`move_parameters`); the router, its bias, ``routes`` and
        ``aux`` are of the logical experts.
      experts: ``experts(x, group_sizes, local_expert, params) -> y``, the compute of this rank's
        experts: ``x`` [N, H] grouped by expert, ``group_sizes`` int32 [E / R], ``local_expert``
        int32 [N] (see `local_expert`), ``params.experts``, and ``y`` [N, H]. By default
        `grouped_mlp`; ``functools.partial`` gives that another activation.
      shared: ``shared(x, params)``, of all rows and ``params.shared``: `mlp`, `sigmoid_gated_mlp`,
        or a function of your own. Not called if ``params.shared`` is None.
      weight_on: whether a row's weight multiplies what its expert returns, or what it gets
        (``"input"``, Llama 4).
      grouped_matmul: what ``experts`` multiplies groups of rows with, as its argument of that name;
        None leaves it to ``experts``.
      implementation: ``"smfree"``, or ``"reference"`` for plain ``jax.numpy`` in place of dispatch
        and combine, to compare with; the token is then returned as it came.

    Returns:
      ``(token, out, aux)``.

    Raises:
      ValueError, TypeError: while tracing, for wrong shapes or dtypes, parameters of other sizes
        than the group's, what is no token; and as `jax_smfree.dispatch_send`.

    Example:
      >>> def model(layers, x):  # inside shard_map
      ...     token = group.token()
      ...     for layer in layers:
      ...         token, out, aux = nn.moe_layer(token, layer, x)
      ...         x = x + out
      ...     return x
      >>> in_specs = [specs, specs], P("ep")
      >>> step = jax.shard_map(model, mesh=mesh, in_specs=in_specs, out_specs=P("ep"))
      >>> jax.jit(step)([params, params], x).shape
      (16, 16)
    """
    name = "moe_layer"
    ops, op_token = operations.enter(name, implementation, token)
    config = token.group.config
    layer = Layer.of(name, config, router, placement, experts, shared, weight_on, grouped_matmul)
    x = layer.check(experts_here(name, token.group), params, x, routes, mask, balance_bias)
    x = layer.masked(x, mask)
    routes = layer.route(x, params.router, params.router_bias, routes, mask, balance_bias)

    op_token = ops.dispatch_send(op_token, x, *layer.sent(routes, token.group.axis))
    if params.shared is not None:
        op_token, of_shared = ops.overlap(op_token, layer.of_shared, x, params.shared)
    d, op_token = ops.dispatch_recv(op_token)
    y = layer.of_experts(d.x, d.weights, d.group_sizes, params.experts)
    op_token = ops.combine_send(op_token, d, y, layer.combine_weights(d))
    out, op_token = ops.combine_recv(op_token)

    if params.shared is not None:
        out = out + of_shared
    token = operations.leave(implementation, token, op_token)
    return token, layer.masked(out, mask), MoeAux.of(routes, d.num_dropped)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The steps of a layer between the operations, by its static arguments, which are right."""

    where: str  # the function that was called, for errors
    config: EpConfig
    router: RouterConfig
    placement: ExpertPlacement | None
    experts: Experts
    shared: Shared
    weight_on: WeightOn
    implementation: Implementation

    @classmethod
    def of(
        cls,
        where: str,
        config: EpConfig,
        router: RouterConfig | None = None,
        placement: ExpertPlacement | None = None,
        experts: Experts = grouped_mlp,
        shared: Shared = mlp,
        weight_on: WeightOn = "output",
        grouped_matmul: GroupedMatmul | None = None,
        implementation: Implementation = "smfree",
    ) -> "Layer":
        if router is None:
            router = RouterConfig(config.top_k, normalise=config.top_k > 1)
        arguments.instance(where, "router", router, RouterConfig)
        if router.top_k != config.top_k:
            raise ValueError(
                f"{where}: got a router with top_k={router.top_k}, expected that of the group's "
                f"EpConfig, {config.top_k}."
            )
        if placement is not None:
            arguments.instance(where, "placement", placement, ExpertPlacement)
            if placement.num_physical != config.num_experts:
                raise ValueError(
                    f"{where}: got a placement of {placement.num_physical} copies, expected as "
                    f"many as num_experts of the group's EpConfig, {config.num_experts}."
                )
        arguments.function(where, "experts", experts)
        arguments.function(where, "shared", shared)
        arguments.choice(where, "weight_on", weight_on, ("output", "input"))
        if grouped_matmul is not None:
            arguments.function(where, "grouped_matmul", grouped_matmul)
            experts = functools.partial(experts, grouped_matmul=grouped_matmul)
        arguments.choice(where, "implementation", implementation, ("smfree", "reference"))
        return cls(where, config, router, placement, experts, shared, weight_on, implementation)

    @property
    def num_logical(self) -> int:
        """Experts of the router."""
        return self.placement.num_experts if self.placement else self.config.num_experts

    def check(
        self,
        num_experts: int,
        params: MoeParams,
        x: Array,
        routes: Routes | None,
        mask: Array | None,
        balance_bias: Array | None,
    ) -> Array:
        """``x``, where all arrays fit the group; ``num_experts`` are those in ``params``."""
        where, config = self.where, self.config
        arguments.instance(where, "params", params, MoeParams, "Make it with nn.init_moe.")
        x = arguments.array(where, "x", x, ("T", config.hidden), config.dtype)
        rows = x.shape[0]
        if mask is not None:
            arguments.array(where, "mask", mask, (rows,), np.bool_)
        if routes is None:
            router = (config.hidden, self.num_logical)
            arguments.array(where, "params.router", params.router, router)
        else:
            arguments.instance(where, "routes", routes, Routes, "nn.route returns one.")
            slots, scores = (rows, config.top_k), (rows, self.num_logical)
            arguments.array(where, "routes.topk_idx", routes.topk_idx, slots, jnp.integer)
            arguments.array(where, "routes.topk_weights", routes.topk_weights, slots)
            arguments.array(where, "routes.probabilities", routes.probabilities, scores)
            if balance_bias is not None:
                raise ValueError(
                    f"{where}: got routes and a balance_bias, expected one of them: the bias is "
                    "for the router, which routes replace."
                )
        if balance_bias is not None:
            arguments.array(where, "balance_bias", balance_bias, (self.num_logical,))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params.experts):
            name = "params.experts" + jax.tree_util.keystr(path)
            shape = arguments.as_array(where, name, leaf, f"an array [{num_experts}, ...]").shape
            if shape[:1] != (num_experts,):
                raise ValueError(
                    f"{where}: got {name}{list(shape)}, expected {name}[{num_experts}, ...]: its "
                    "first axis is that of the experts."
                )
        return x

    def masked(self, x: Array, mask: Array | None) -> Array:
        return x if mask is None else jnp.where(mask[:, None], x, jnp.zeros((), x.dtype))

    def route(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        routes: Routes | None,
        mask: Array | None,
        balance_bias: Array | None,
    ) -> Routes:
        if routes is None:
            assert weight is not None  # by `check`
            return route(x, weight, self.router, bias=bias, balance_bias=balance_bias, mask=mask)
        topk_idx = routes.topk_idx.astype(jnp.int32)
        if mask is not None:
            topk_idx = jnp.where(mask[:, None], topk_idx, jnp.int32(-1))
        return routes._replace(
            topk_idx=topk_idx, topk_weights=routes.topk_weights.astype(jnp.float32)
        )

    def sent(self, routes: Routes, axis: Any) -> tuple[Array, Array]:
        """The routes that ``dispatch_send`` takes."""
        if self.placement is not None:
            routes = spread(routes, self.placement, rank=jax.lax.axis_index(axis))
        return routes.topk_idx, routes.topk_weights

    def of_shared(self, x: Array, params: Any) -> Array:
        out = self.shared(x, params)
        return arguments.array(self.where, "the result of shared", out, x.shape, x.dtype)

    def of_experts(self, x: Array, weights: Array, group_sizes: Array, params: Any) -> Array:
        if self.weight_on == "input":
            x = (x.astype(jnp.float32) * weights[:, None]).astype(x.dtype)
        # Experts that do not look at it leave it to the compiler to drop.
        of_rows = local_expert(group_sizes, x.shape[0])
        y = self.experts(x, group_sizes, of_rows, params)
        return arguments.array(self.where, "the result of experts", y, x.shape, x.dtype)

    def combine_weights(self, d: Any) -> Array | None:
        weights: Array | None = d.weights if self.weight_on == "output" else None
        return weights


def experts_here(where: str, group: Any) -> int:
    """Of this rank: the call stands inside of a ``shard_map``."""
    names = group_axis.names(group.axis)
    if not compat.manual_axes().issuperset(names):
        raise ValueError(
            f"{where}: got a call outside of jax.shard_map, expected one inside of it, over all "
            f"axes of the group's mesh, {', '.join(names)} included. On global arrays it is "
            "nn.moe_layer_on_mesh."
        )
    experts: int = group.config.num_experts // jax.lax.axis_size(group.axis)
    return experts
