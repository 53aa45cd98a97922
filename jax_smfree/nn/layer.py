# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer."""

from typing import Any, NamedTuple

import jax
from jax import Array
from jax.tree_util import SequenceKey

from jax_smfree._src import arguments, compat
from jax_smfree._src.config import EpConfig
from jax_smfree.nn import operations
from jax_smfree.nn.balance import expert_load, load_balancing_loss
from jax_smfree.nn.experts import check_swiglu, grouped_mlp, mlp
from jax_smfree.nn.matmul import GroupedMatmul, grouped_matmul
from jax_smfree.nn.operations import Implementation
from jax_smfree.nn.params import MoeParams
from jax_smfree.nn.router import RouterConfig, Routes, route


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
    balance_bias: Array | None = None,
    grouped_matmul: GroupedMatmul = grouped_matmul,
    implementation: Implementation = "smfree",
) -> tuple[Any, Array, MoeAux]:
    """Routed experts plus, if there is one, the shared expert, which runs while the rows move.

    Shapes: ``x`` [T, H] -> [T, H]; sizes as in the ``EpConfig`` of the token's group.
    Sharding: to be called inside ``jax.shard_map``, manual over the group's mesh. ``x`` is this
    rank's rows and ``params.experts`` this rank's experts; ``params.router``, ``params.shared``
    and ``balance_bias`` are replicated (`moe_specs`).
    Differentiation: of everything but ``balance_bias``. In the backward pass the gradient of the
    shared expert is computed while the gradients of the rows move.

    Args:
      token: ready, on any lane.
      params: from `init_moe`.
      x: the rows.
      balance_bias: float32 [E], see `update_balance_bias`.
      grouped_matmul: multiplies groups of rows with their experts.
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
    ops, op_token = operations.enter("moe_layer", implementation, token)
    config, experts = token.group.config, experts_here("moe_layer", token.group)
    check_layer("moe_layer", config, experts, params, x, balance_bias, grouped_matmul)
    routes = route(x, params.router, router_config(config), balance_bias=balance_bias)

    op_token = ops.dispatch_send(op_token, x, routes.topk_idx, routes.topk_weights)
    if params.shared is not None:
        op_token, shared = ops.overlap(op_token, mlp, x, params.shared)
    d, op_token = ops.dispatch_recv(op_token)
    y = grouped_mlp(d.x, d.group_sizes, params.experts, grouped_matmul=grouped_matmul)
    op_token = ops.combine_send(op_token, d, y)
    out, op_token = ops.combine_recv(op_token)

    if params.shared is not None:
        out = out + shared
    token = operations.leave(implementation, token, op_token)
    return token, out, MoeAux.of(routes, d.num_dropped)


def router_config(config: EpConfig) -> RouterConfig:
    """A softmax, normalised; with one expert per row not, as in the Switch Transformer."""
    return RouterConfig(config.top_k, normalise=config.top_k > 1)


def check_layer(
    where: str,
    config: EpConfig,
    experts: int,
    params: MoeParams,
    x: Array,
    balance_bias: Array | None,
    grouped_matmul: GroupedMatmul,
) -> None:
    """The operands of a layer fit its group; ``experts`` are those in ``params``."""
    arguments.instance(where, "params", params, MoeParams, "Make it with nn.init_moe.")
    arguments.function(where, "grouped_matmul", grouped_matmul)
    hidden, dtype = config.hidden, config.dtype
    arguments.array(where, "x", x, ("T", hidden), dtype)
    arguments.array(where, "params.router", params.router, (hidden, config.num_experts))
    check_swiglu(where, "params.experts", params.experts, (experts,), hidden, dtype)
    if params.shared is not None:
        check_swiglu(where, "params.shared", params.shared, (), hidden, dtype)
    if balance_bias is not None:
        arguments.array(where, "balance_bias", balance_bias, (config.num_experts,))


def experts_here(where: str, group: Any) -> int:
    """Of this rank: the call stands inside of a ``shard_map``."""
    axes = group.axis if isinstance(group.axis, tuple) else (group.axis,)
    if not compat.manual_axes().issuperset(axes):
        raise ValueError(
            f"{where}: got a call outside of jax.shard_map, expected one inside of it, over all "
            f"axes of the group's mesh, {', '.join(axes)} included. On global arrays it is "
            "nn.moe_layer_on_mesh."
        )
    experts: int = group.config.num_experts // jax.lax.axis_size(group.axis)
    return experts
