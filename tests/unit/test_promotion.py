# SPDX-License-Identifier: Apache-2.0
"""Settings of JAX that refuse or change promotion change nothing of what the library returns."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import nn
from jax_smfree._src import reference
from support import as_many, ep_mesh, in_all_kinds, portable_too, x64

EXPERTS, TOP_K, HIDDEN, WIDTH, ROWS, BLOCK = 8, 2, 16, 24, 8, 4
CONFIG = {
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "hidden": HIDDEN,
    "max_tokens": ROWS,
    "expert_alignment": BLOCK,
    "num_lanes": 2,
}


@contextlib.contextmanager
def setting(name):
    """No promotion of dtypes or ranks; and, if so named, 64 bits as the default."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        with x64() if name == "strict, x64" else contextlib.nullcontext():
            yield


def operations(group, ops, x, idx, weights):
    """Every public operation, in one program; what they return."""
    token = ops.dispatch_send(group.token(), x, idx, weights)
    token, doubled = ops.overlap(token, lambda x: x + x, x)
    d, token = ops.dispatch_recv(token)
    token = ops.combine_send(token, d, d.x)
    out, token = ops.combine_recv(token)
    if ops is smfree:
        again, token = smfree.dispatch(token, x, idx)
        token, out = smfree.tie(token, out)
        plain, token = smfree.combine(token, again, again.x, None)
        hook = smfree.dispatch(token, x, idx, weights, return_recv_hook=True)
        out = out + plain + hook.overlap(jnp.tanh, x) + hook()[0].x[: x.shape[0]]
    return {"out": out + doubled, "weights": d.weights, "sizes": d.group_sizes[None],
            "dropped": d.num_dropped[None], "rows": d.handle.rows}  # fmt: skip


def api_program(group, ops, dtype):
    """Values and gradients of `operations`, from arrays of the dtypes that they take."""
    rows = group.num_ranks * ROWS
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, HIDDEN)), dtype)
    idx = jnp.asarray(np.stack([np.arange(rows) % 4, 4 + np.arange(rows) % 4], 1), jnp.int32)
    weights = jnp.linspace(0.1, 1, rows * TOP_K, dtype=jnp.float32).reshape(rows, TOP_K)
    start = group if ops is smfree else reference.Group(group.axis, group.config)

    def on_each_rank(x, idx, weights):
        return operations(start, ops, x, idx, weights)

    sharded = jax.shard_map(
        on_each_rank, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep")
    )  # fmt: skip

    def loss(x, weights):
        result = sharded(x, idx, weights)
        return jnp.sum(result["out"].astype(jnp.float32)), result

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, weights)


def layer_program(group, layer, dtype):
    """Parameters, outputs, gradients, the state after a step."""
    key = jax.random.key(0)
    sizes = {"hidden": HIDDEN, "num_experts": EXPERTS, "expert_width": WIDTH}
    params = nn.init_moe(key, **sizes, shared_width=WIDTH, dtype=dtype)
    x = jax.random.normal(key, (group.num_ranks * ROWS, HIDDEN), dtype)
    bias = jnp.linspace(-0.01, 0.01, EXPERTS, dtype=jnp.float32)

    def loss(params, x):
        out, aux = layer(group, params, x, bias)
        scalar = jnp.sum(out.astype(jnp.float32)) + aux.load_balancing_loss
        return scalar, (out, aux)

    gradients, (out, aux) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return params, gradients, out, aux, nn.update_balance_bias(bias, aux.load)


def on_mesh(group, params, x, bias, **options):
    return nn.moe_layer_on_mesh(group, params, x, balance_bias=bias, **options)


def inside(group, params, x, bias, body):
    def on_each_rank(params, x, bias):
        out, aux = body(group, params, x, bias)
        return out, jax.tree.map(lambda a: jax.lax.psum(a, "ep"), aux)

    specs = (nn.moe_specs(params, "ep"), P("ep"), P())
    return jax.shard_map(
        on_each_rank, mesh=group.mesh, in_specs=specs, out_specs=(P("ep"), P())
    )(params, x, bias)  # fmt: skip


def two_batches(group, params, x, bias):
    tokens = (group.token(0), group.token(1))
    xs = jnp.split(x, 2)
    _, outs, auxs = nn.moe_two_batches(tokens, params, tuple(xs), balance_bias=bias)
    return jnp.concatenate(outs), auxs[0]


def by_reference(group, params, x, bias):
    return nn.moe_layer(
        group.token(), params, x, balance_bias=bias, implementation="reference"
    )[1:]  # fmt: skip


LAYERS = {
    "on_mesh": on_mesh,
    "block_matmul": functools.partial(
        on_mesh, grouped_matmul=functools.partial(nn.block_matmul, block_rows=BLOCK)
    ),
    "two_batches": functools.partial(inside, body=two_batches),
    "reference": functools.partial(inside, body=by_reference),
}
SETTINGS = pytest.mark.parametrize("name", ["strict", "strict, x64"])


def assert_same(got, expected):
    """The same dtypes, and the same values but for what XLA fuses differently."""
    names = jax.tree.map(lambda a: a.dtype.name, expected)
    assert jax.tree.map(lambda a: a.dtype.name, got) == names
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        tolerance = 1e-5 if g.dtype in (jnp.float32, jnp.int32) else 0.1
        np.testing.assert_allclose(
            np.asarray(g, np.float64), np.asarray(e, np.float64), rtol=tolerance, atol=tolerance
        )


@in_all_kinds
@SETTINGS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("ops", [smfree, reference], ids=["smfree", "reference"])
def test_operations(groups, ops, dtype, name):
    group = groups(ep_mesh(as_many(4)), **CONFIG, dtype=dtype)
    expected = api_program(group, ops, dtype)
    with setting(name):
        got = api_program(group, ops, dtype)
    assert_same(got, expected)


@SETTINGS
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(groups, layer, name):
    dtype = jnp.bfloat16
    group = groups(ep_mesh(as_many(4)), **CONFIG, dtype=dtype)
    expected = layer_program(group, LAYERS[layer], dtype)
    with setting(name):
        got = layer_program(group, LAYERS[layer], dtype)
    assert_same(got, expected)


def router_program():
    """Everything that routers and balance return, and gradients."""
    x = jax.random.normal(jax.random.key(0), (ROWS, HIDDEN), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), (HIDDEN, EXPERTS), jnp.float32)
    bias = jnp.linspace(-0.1, 0.1, EXPERTS, dtype=jnp.float32)
    ids, mask = jnp.arange(ROWS, dtype=jnp.int32) // 3, jnp.arange(ROWS) < ROWS - 1
    placement = nn.plan_placement(np.arange(EXPERTS), EXPERTS + 2, 2)

    def loss(x, weight, config):
        routes = nn.route(x, weight, config, bias=bias, balance_bias=bias, mask=mask)
        losses = (
            nn.load_balancing_loss(routes, sequences=3, sequence_ids=ids),
            nn.load_balancing_loss(routes, sequences=2),
            nn.router_z_loss(routes),
        )
        return sum(losses, start=jnp.sum(routes.topk_weights[:, 0])), (routes, losses)

    def results(config):
        gradients, (routes, losses) = jax.grad(loss, (0, 1), has_aux=True)(x, weight, config)
        load = nn.expert_load(routes.topk_idx, EXPERTS)
        moved = ()
        if config.groups_kept == config.num_groups:
            moved = nn.quantile_balance_bias(bias, routes, config)
        spread = nn.spread(routes, placement, rank=1)
        return gradients, routes, losses, moved, spread, nn.load_metrics(load)

    groups = {"num_groups": 4, "groups_kept": 2, "group_score": "top2"}
    configs = [
        nn.RouterConfig(TOP_K, score="sigmoid", scale=2.5, **groups),
        nn.RouterConfig(TOP_K, softmax="after"),
        nn.RouterConfig(TOP_K, score="sqrt_softplus", normalise=False),
    ]
    routed = jax.jit(lambda: [results(config) for config in configs])()
    return routed, nn.balanced_routes(ROWS, EXPERTS, TOP_K)


@SETTINGS
def test_routers(name):
    expected = router_program()
    with setting(name):
        assert_same(router_program(), expected)


@portable_too
@SETTINGS
def test_checkpoint_and_second_order(groups, name):
    group = groups(ep_mesh(as_many(4)), **CONFIG, dtype=jnp.float32)

    def program():
        key = jax.random.key(0)
        sizes = {"hidden": HIDDEN, "num_experts": EXPERTS, "expert_width": WIDTH}
        params = nn.init_moe(key, **sizes)
        x = jax.random.normal(key, (group.num_ranks * ROWS, HIDDEN), jnp.float32)

        @jax.checkpoint
        def layer(x):
            return jnp.sum(nn.moe_layer_on_mesh(group, params, x)[0] ** 2)

        return jax.jit(lambda x: jax.jvp(jax.grad(layer), (x,), (x,)))(x)

    expected = program()
    with setting(name):
        assert_same(program(), expected)
