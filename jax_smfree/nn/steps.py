# SPDX-License-Identifier: Apache-2.0
"""What a layer does between the operations, and what it refuses."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_smfree._src import api, arguments, compat, group_axis
from jax_smfree._src.config import EpConfig
from jax_smfree._src.rows import local_expert
from jax_smfree.nn import deferred
from jax_smfree.nn.deferred import Change
from jax_smfree.nn.experts import Experts, grouped_mlp, is_ready
from jax_smfree.nn.matmul import GroupedMatmul
from jax_smfree.nn.operations import Implementation
from jax_smfree.nn.params import MoeParams
from jax_smfree.nn.physical import ExpertPlacement, spread
from jax_smfree.nn.router import RouterConfig, Routes, route
from jax_smfree.nn.shared import Part, Shared, in_two, mlp

WeightOn = Literal["output", "hidden", "input"]


class Layer:
    """The steps of a layer between the operations, by its static arguments.

    ``where`` is the function that was called, for errors.

    Raises:
      ValueError, TypeError: for arguments that are not right, or do not fit ``config``.
    """

    def __init__(
        self,
        where: str,
        config: EpConfig,
        *,
        router: RouterConfig | None = None,
        placement: ExpertPlacement | None = None,
        experts: Experts = grouped_mlp,
        shared: Shared = mlp,
        weight_on: WeightOn = "output",
        grouped_matmul: GroupedMatmul | None = None,
        implementation: Implementation = "smfree",
    ) -> None:
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
        arguments.choice(where, "weight_on", weight_on, ("output", "hidden", "input"))
        if weight_on == "hidden" and not _takes(experts, "weights"):
            raise TypeError(
                f"{where}: got weight_on='hidden' and experts {arguments.shown(experts)}, expected "
                "experts that take weights=, float32 [N], and return weighted results, as "
                "nn.grouped_mlp does."
            )
        if grouped_matmul is not None:
            arguments.function(where, "grouped_matmul", grouped_matmul)
            if config.layout == "padded":
                raise ValueError(
                    f"{where}: got a grouped_matmul for a group with EpConfig.layout='padded', "
                    "expected None: its rows are a batch of equally many for each expert, which no "
                    "grouped matmul takes. Leave it out, or pass experts of your own."
                )
            experts = functools.partial(experts, grouped_matmul=grouped_matmul)
        arguments.choice(where, "implementation", implementation, ("smfree", "reference"))
        self.where, self.config = where, config
        self.router, self.placement = router, placement
        self.experts, self.shared, self.weight_on = experts, shared, weight_on

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

    def parts_of_shared(self, x: Array, params: Any) -> tuple[Part, ...]:
        """What to do while the rows move to the experts, and what while they come back."""
        if params is None:
            return ()
        return in_two(self.shared, x, params) or (Part(self.of_shared, params),)

    def recv(self, ops: Any, token: Any, params: Any) -> tuple[Any, Any, Array]:
        """The recv phase of the dispatch, and the experts on what came: ``(d, token, y)``."""

        def compute(d: Any, params: Any, change: Change | None = None) -> Array:
            return self.of_experts(d.x, d.weights, d.group_sizes, params, change)

        if ops is api and is_ready(self.experts):
            return deferred.recv(token, compute, params)
        d, token = ops.dispatch_recv(token)
        return d, token, compute(d, params)

    def of_experts(
        self,
        x: Array,
        weights: Array,
        group_sizes: Array,
        params: Any,
        change: Change | None = None,
    ) -> Array:
        """What the experts return, or others that ``change`` makes of them."""
        experts = self.experts if change is None else change(self.experts)
        if self.weight_on == "input":
            x = (x.astype(jnp.float32) * weights[..., None]).astype(x.dtype)
        more = {"weights": weights} if self.weight_on == "hidden" else {}
        # Experts that do not look at it leave it to the compiler to drop.
        of_rows = local_expert(group_sizes, weights.shape)
        y = experts(x, group_sizes, of_rows, params, **more)
        return arguments.array(self.where, "the result of experts", y, x.shape, x.dtype)

    def combine_weights(self, d: Any) -> Array | None:
        weights: Array | None = d.weights if self.weight_on == "output" else None
        return weights


def _takes(function: Callable[..., Any], argument: str) -> bool:
    """By name. What has no signature says so when it is called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return True
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def experts_here(where: str, group: Any) -> int:
    """How many experts this rank has; the call has to stand inside of a ``shard_map``."""
    names = group_axis.names(group.axis)
    if not compat.manual_axes().issuperset(names):
        raise ValueError(
            f"{where}: got a call outside of jax.shard_map, expected one inside of it, over all "
            f"axes of the group's mesh, {', '.join(names)} included. On global arrays it is "
            "nn.moe_layer_on_mesh."
        )
    experts: int = group.config.num_experts // jax.lax.axis_size(group.axis)
    return experts
