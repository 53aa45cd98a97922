# SPDX-License-Identifier: Apache-2.0
"""Two micro-batches through one layer, each computing while the other's rows move.

    compute                      lane 0                lane 1
    ---------------------------  --------------------  --------------------
    route 0                      dispatch_send 0
    route 1                      | rows of 0 move      dispatch_send 1
    shared expert of 0           dispatch_recv 0       | rows of 1 move
    experts on batch 0                                 |
                                 combine_send 0        dispatch_recv 1
    experts on batch 1           | results of 0 move
                                 combine_recv 0        combine_send 1
    shared expert of 1                                 | results of 1 move
                                                       combine_recv 1

So every movement has compute of its own to hide behind, and in the backward pass, where the order
turns around, its gradient. One batch alone (`moe_layer`) has the shared expert for that.
"""

from typing import Any, Unpack

from jax import Array

from jax_smfree._src import arguments
from jax_smfree.nn import operations
from jax_smfree.nn.layer import LayerOptions, MoeAux
from jax_smfree.nn.params import MoeParams
from jax_smfree.nn.router import Routes
from jax_smfree.nn.steps import Layer, experts_here


def moe_two_batches(
    tokens: tuple[Any, Any],
    params: MoeParams,
    xs: tuple[Array, Array],
    *,
    routes: tuple[Routes | None, Routes | None] = (None, None),
    masks: tuple[Array | None, Array | None] = (None, None),
    balance_bias: Array | None = None,
    **options: Unpack[LayerOptions],
) -> tuple[tuple[Any, Any], tuple[Array, Array], tuple[MoeAux, MoeAux]]:
    """`moe_layer` for two micro-batches at once: the same values, more overlap.

    Shapes: each of ``xs`` [T, H] -> [T, H].
    Sharding, differentiation and the other arguments: as `moe_layer`.
    Memory: both batches' buffers at once, ``num_lanes=2``.

    Args:
      tokens: ready, on two lanes: ``(group.token(0), group.token(1))``.
      params: see `moe_layer`.
      xs: the rows of the two micro-batches.
      routes: those of each, or None, see `moe_layer`.
      masks: that of each, or None, see `moe_layer`.
      balance_bias: see `moe_layer`.
      options: the static arguments of `moe_layer`, `LayerOptions`.

    Returns:
      ``(tokens, outs, auxs)``, a pair each.

    Raises:
      ValueError, TypeError: as `moe_layer`.

    Example:
      >>> def two(params, x):  # inside shard_map
      ...     tokens = group.token(0), group.token(1)
      ...     tokens, outs, auxs = nn.moe_two_batches(tokens, params, tuple(jnp.split(x, 2)))
      ...     return jnp.concatenate(outs)
      >>> step = jax.shard_map(two, mesh=mesh, in_specs=(specs, P("ep")), out_specs=P("ep"))
      >>> jax.jit(step)(params, x).shape
      (16, 16)
    """
    name = "moe_two_batches"
    pairs = {"tokens": tokens, "xs": xs, "routes": routes, "masks": masks}
    for what, pair in pairs.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"{name}: got {arguments.shown(pair)} as {what}, expected a pair, one for each "
                "micro-batch."
            )
    implementation = options.get("implementation", "smfree")
    ops, token0 = operations.enter(name, implementation, tokens[0])
    ops, token1 = operations.enter(name, implementation, tokens[1])
    group = tokens[0].group
    if tokens[1].group != group:
        raise ValueError(
            f"{name}: got tokens of two groups, expected two lanes of one: group.token(0) and "
            "group.token(1)."
        )
    layer, here = Layer(name, group.config, **options), experts_here(name, group)
    x0, x1 = (
        layer.masked(layer.check(here, params, x, given, mask, balance_bias), mask)
        for x, given, mask in zip(xs, routes, masks, strict=True)
    )

    shared0 = shared1 = None
    router, axis = (params.router, params.router_bias), group.axis
    routes0 = layer.route(x0, *router, routes[0], masks[0], balance_bias)
    token0 = ops.dispatch_send(token0, x0, *layer.sent(routes0, axis))
    given1 = (x1, *router, routes[1], masks[1], balance_bias)
    token0, routes1 = ops.overlap(token0, layer.route, *given1)
    token1 = ops.dispatch_send(token1, x1, *layer.sent(routes1, axis))
    if params.shared is not None:
        token0, shared0 = ops.overlap(token0, layer.of_shared, x0, params.shared)
    d0, token0 = ops.dispatch_recv(token0)
    received0 = (d0.x, d0.weights, d0.group_sizes, params.experts)
    token1, y0 = ops.overlap(token1, layer.of_experts, *received0)
    token0 = ops.combine_send(token0, d0, y0, layer.combine_weights(d0))
    d1, token1 = ops.dispatch_recv(token1)
    received1 = (d1.x, d1.weights, d1.group_sizes, params.experts)
    token0, y1 = ops.overlap(token0, layer.of_experts, *received1)
    token1 = ops.combine_send(token1, d1, y1, layer.combine_weights(d1))
    out0, token0 = ops.combine_recv(token0, add=shared0)
    if params.shared is not None:
        token1, shared1 = ops.overlap(token1, layer.of_shared, x1, params.shared)
    out1, token1 = ops.combine_recv(token1, add=shared1)

    out0, out1 = map(layer.masked, (out0, out1), masks)
    return (
        (
            operations.leave(implementation, tokens[0], token0),
            operations.leave(implementation, tokens[1], token1),
        ),
        (out0, out1),
        (MoeAux.of(routes0, d0.num_dropped), MoeAux.of(routes1, d1.num_dropped)),
    )
