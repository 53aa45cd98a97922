# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer."""

from typing import Any, NamedTuple, TypedDict

import jax
from jax import Array
from jax.tree_util import SequenceKey

from jax_smfree.nn import operations
from jax_smfree.nn.balance import expert_load, load_balancing_loss
from jax_smfree.nn.experts import Experts, grouped_mlp
from jax_smfree.nn.matmul import GroupedMatmul
from jax_smfree.nn.operations import Implementation
from jax_smfree.nn.params import MoeParams
from jax_smfree.nn.physical import ExpertPlacement
from jax_smfree.nn.router import RouterConfig, Routes
from jax_smfree.nn.shared import Shared, mlp
from jax_smfree.nn.steps import Layer, WeightOn, experts_here


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
    num_dropped: Array  # int32 [], copies that did not fit into this rank's capacities

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

    `mlp` and `sigmoid_gated_mlp` run while the rows move to the experts, but for their last matmul,
    which runs while the results come back; a shared expert of your own runs in the first place. Its
    result is added to the routed ones' in float32, before they are rounded.

    Shapes: ``x`` [T, H] -> [T, H]; sizes as in the ``EpConfig`` of the token's group.
    Sharding: to be called inside ``jax.shard_map``, manual over the group's mesh. ``x`` is this
    rank's rows and ``params.experts`` this rank's experts; the other parameters and
    ``balance_bias`` are replicated (`moe_specs`).
    Differentiation: in everything but ``balance_bias`` and the choice of experts. In the backward
    pass the gradient of the shared expert is computed while the gradients of the rows move, to the
    experts and back; those of the parameters of `grouped_mlp` while they move back.

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
      placement: where redundant copies of experts are. ``config.num_experts`` then counts the
        copies, and ``params.experts`` are theirs (`move_parameters`); the router, its bias,
        ``routes`` and ``aux`` know logical experts.
      experts: ``experts(x, group_sizes, local_expert, params) -> y``, the compute of this rank's
        experts: ``x`` [N, H] grouped by expert, ``group_sizes`` int32 [E / R], ``local_expert``
        int32 [N] (see `local_expert`), ``params.experts``, and ``y`` [N, H]; [E / R, C] in the
        place of [N] where ``EpConfig.layout`` is "padded". By default `grouped_mlp`, which takes
        both; ``functools.partial`` gives that another activation.
      shared: ``shared(x, params)``, of all rows and ``params.shared``: `mlp`, `sigmoid_gated_mlp`,
        or a function of your own. Not called if ``params.shared`` is None.
      weight_on: what a row's weight multiplies: what its expert returns; what goes into the
        expert's last matmul (``"hidden"``), which is the same but for rounding, and keeps less for
        the backward pass; or what the expert gets (``"input"``, Llama 4). For ``"hidden"``,
        ``experts`` take ``weights=`` [N], as `grouped_mlp` does, and return weighted results.
      grouped_matmul: what ``experts`` multiplies groups of rows with, as its argument of that name;
        None leaves it to ``experts``, as in the padded layout, which has none.
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
    layer = Layer(
        name, token.group.config, router=router, placement=placement, experts=experts,
        shared=shared, weight_on=weight_on, grouped_matmul=grouped_matmul,
    )  # fmt: skip
    x = layer.check(experts_here(name, token.group), params, x, routes, mask, balance_bias)
    x = layer.masked(x, mask)
    routes = layer.route(x, params.router, params.router_bias, routes, mask, balance_bias)

    shared_parts = layer.parts_of_shared(x, params.shared)
    of_shared: Any = None
    op_token = ops.dispatch_send(op_token, x, *layer.sent(routes, token.group.axis))
    for part in shared_parts[:1]:
        op_token, of_shared = ops.overlap(op_token, part.function, x, part.params)
    d, op_token, y = layer.recv(ops, op_token, params.experts)
    op_token = ops.combine_send(op_token, d, y, layer.combine_weights(d))
    for part in shared_parts[1:]:
        op_token, of_shared = ops.overlap(op_token, part.function, of_shared, part.params)
    out, op_token = ops.combine_recv(op_token, add=of_shared)

    token = operations.leave(implementation, token, op_token)
    return token, layer.masked(out, mask), MoeAux.of(routes, d.num_dropped)
