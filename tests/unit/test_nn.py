# SPDX-License-Identifier: Apache-2.0
"""The MoE layers against the same layer written without any expert parallelism."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jax_smfree as smfree
from jax_smfree import nn

NUM_RANKS, NUM_EXPERTS, TOP_K = 4, 8, 2
HIDDEN, WIDTH, TOKENS = 16, 24, 12
BLOCK = 4
P = PartitionSpec
IMPLEMENTATIONS = ["smfree", "reference"]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:NUM_RANKS]), ("ep",))


@pytest.fixture(scope="module")
def group(mesh: Mesh) -> Any:
    config = smfree.EpConfig(
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        max_tokens=TOKENS,
        dtype=jnp.float32,
        expert_alignment=BLOCK,
        num_lanes=2,
    )
    with smfree.EpGroup.create(mesh, "ep", config=config) as group:
        yield group


def make_params(*, shared: bool = True) -> nn.MoeParams:
    return nn.init_moe(
        jax.random.key(0),
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        expert_width=WIDTH,
        shared_width=WIDTH if shared else 0,
    )


def make_rows(seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (NUM_RANKS * TOKENS, HIDDEN))


def dense_layer(params: nn.MoeParams, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Every expert on every row, weighted with zero where the router did not choose it."""
    routes = nn.route(x, params.router, TOP_K, balance_bias=bias)
    all_outputs = jax.vmap(nn.mlp, in_axes=(None, 0), out_axes=1)(x, params.experts)
    weights = jnp.zeros((x.shape[0], NUM_EXPERTS))
    weights = weights.at[jnp.arange(x.shape[0])[:, None], routes.topk_idx].set(routes.topk_weights)
    out = jnp.einsum("te,teh->th", weights, all_outputs)
    return out if params.shared is None else out + nn.mlp(x, params.shared)


def sharded(group: Any, params: nn.MoeParams, body: Any, *, check_vma: bool = True) -> Any:
    """``body(token, params, x) -> (out, aux)`` over the mesh, with a rank axis added to aux."""

    def with_token(params: nn.MoeParams, x: jax.Array) -> Any:
        out, aux = body(group.token(), params, x)
        return out, jax.tree.map(lambda a: a[None], aux)

    return jax.shard_map(
        with_token,
        mesh=group.mesh,
        in_specs=(nn.moe_specs(params, "ep"), P("ep")),
        out_specs=(P("ep"), P("ep")),
        check_vma=check_vma,
    )


def assert_close(got: Any, want: Any) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5), got, want)


def value_and_grad(layer: Any, params: nn.MoeParams, x: jax.Array) -> Any:
    """Of a loss that is not symmetric in anything."""

    def loss(params: nn.MoeParams, x: jax.Array) -> Any:
        out = layer(params, x)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape) / out.size), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_layer_and_its_gradients_equal_the_dense_layer(
    group: Any, implementation: Any, shared: bool
) -> None:
    params, x = make_params(shared=shared), make_rows()

    def body(token: Any, params: nn.MoeParams, x: jax.Array) -> Any:
        _, out, aux = nn.moe_layer(token, params, x, implementation=implementation)
        return out, aux

    layer = sharded(group, params, body)
    got = value_and_grad(lambda p, x: layer(p, x)[0], params, x)
    assert_close(got, value_and_grad(dense_layer, params, x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layer_without_varying_types_and_with_block_matmul(group: Any, implementation: Any) -> None:
    params, x = make_params(), make_rows()
    bias = jnp.linspace(-0.1, 0.1, NUM_EXPERTS)

    def body(token: Any, params: nn.MoeParams, x: jax.Array) -> Any:
        _, out, aux = nn.moe_layer(
            token,
            params,
            x,
            balance_bias=bias,
            grouped_matmul=functools.partial(nn.block_matmul, block_rows=BLOCK),
            implementation=implementation,
        )
        return out, aux

    layer = sharded(group, params, body, check_vma=False)
    got = value_and_grad(lambda p, x: layer(p, x)[0], params, x)
    assert_close(got, value_and_grad(lambda p, x: dense_layer(p, x, bias), params, x))
    aux = jax.jit(layer)(params, x)[1]
    routes = nn.route(x, params.router, TOP_K, balance_bias=bias)
    np.testing.assert_array_equal(
        aux.load.sum(axis=0), nn.expert_load(routes.topk_idx, NUM_EXPERTS)
    )
    assert not aux.num_dropped.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_two_batches_equal_one_after_the_other(
    group: Any, implementation: Any, shared: bool
) -> None:
    params, x = make_params(shared=shared), make_rows()

    def two(token: Any, params: nn.MoeParams, x: jax.Array) -> Any:
        _, outs, auxs = nn.moe_two_batches(
            (token, group.token(1)),
            params,
            tuple(jnp.split(x, 2)),
            implementation=implementation,
        )
        return jnp.concatenate(outs), auxs

    def one_by_one(token: Any, params: nn.MoeParams, x: jax.Array) -> Any:
        outs, auxs = [], []
        for half in jnp.split(x, 2):
            token, out, aux = nn.moe_layer(token, params, half, implementation=implementation)
            outs.append(out)
            auxs.append(aux)
        return jnp.concatenate(outs), tuple(auxs)

    (loss, out), grads = value_and_grad(
        lambda p, x: sharded(group, params, two)(p, x)[0], params, x
    )
    (_, expected), expected_grads = value_and_grad(
        lambda p, x: sharded(group, params, one_by_one)(p, x)[0], params, x
    )
    assert np.isfinite(loss)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    assert_close(grads, expected_grads)
    auxs, expected_auxs = (
        jax.jit(sharded(group, params, body))(params, x)[1] for body in (two, one_by_one)
    )
    assert_close(auxs, expected_auxs)


def test_reference_needs_no_group(mesh: Mesh, group: Any) -> None:
    params, x = make_params(), make_rows()
    stand_in = nn.ReferenceGroup("ep", group.config)

    def body(params: nn.MoeParams, x: jax.Array) -> jax.Array:
        return nn.moe_layer(stand_in.token(), params, x, implementation="reference")[1]

    specs = nn.moe_specs(params, "ep")
    layer = jax.shard_map(body, mesh=mesh, in_specs=(specs, P("ep")), out_specs=P("ep"))
    assert_close(jax.jit(layer)(params, x), dense_layer(params, x))


def test_unknown_implementation_is_refused(group: Any) -> None:
    token = nn.ReferenceGroup("ep", group.config).token()
    with pytest.raises(ValueError, match="implementation='magic'"):
        nn.moe_layer(token, make_params(), make_rows(), implementation="magic")  # type: ignore[arg-type]


def test_route_chooses_by_score_and_weighs_by_probability() -> None:
    x, router_weights = make_rows(), make_params().router
    bias = jnp.zeros(NUM_EXPERTS).at[3].set(2.0)
    routes = nn.route(x, router_weights, TOP_K, balance_bias=bias)
    assert (routes.topk_idx[:, 0] == 3).all(), "a bias above 1 wins everywhere"
    np.testing.assert_allclose(routes.topk_weights.sum(-1), 1, rtol=1e-6)
    chosen = jnp.take_along_axis(routes.probabilities, routes.topk_idx, axis=-1)
    ratio = chosen / routes.topk_weights
    np.testing.assert_allclose(ratio, ratio[:, :1].repeat(TOP_K, axis=1), rtol=1e-5)


def test_load_balancing_loss_is_one_when_balanced_and_e_when_collapsed() -> None:
    idx = jnp.arange(TOKENS * TOP_K, dtype=jnp.int32).reshape(TOKENS, TOP_K) % NUM_EXPERTS
    uniform = jnp.full((TOKENS, NUM_EXPERTS), 1 / NUM_EXPERTS)
    load = nn.expert_load(idx, NUM_EXPERTS)
    np.testing.assert_allclose(nn.load_balancing_loss(uniform, load), 1, rtol=1e-6)
    certain = jnp.zeros((TOKENS, NUM_EXPERTS)).at[:, 0].set(1.0)
    load = nn.expert_load(jnp.zeros((TOKENS, 1), jnp.int32), NUM_EXPERTS)
    np.testing.assert_allclose(nn.load_balancing_loss(certain, load), NUM_EXPERTS, rtol=1e-6)


def test_balance_bias_evens_out_the_load() -> None:
    x = make_rows() + 1.0  # a common direction, so that some experts are chosen far too often
    router_weights = make_params().router

    def spread(bias: jax.Array) -> float:
        load = nn.expert_load(
            nn.route(x, router_weights, TOP_K, balance_bias=bias).topk_idx, NUM_EXPERTS
        )
        return float(jnp.std(load) / jnp.mean(load))

    @jax.jit
    def step(bias: jax.Array, _: None) -> tuple[jax.Array, None]:
        load = nn.expert_load(
            nn.route(x, router_weights, TOP_K, balance_bias=bias).topk_idx, NUM_EXPERTS
        )
        return nn.update_balance_bias(bias, load, rate=5e-3), None

    start = jnp.zeros(NUM_EXPERTS)
    trained, _ = jax.lax.scan(step, start, None, length=200)
    assert spread(trained) < 0.3 * spread(start)


@pytest.mark.parametrize("group_sizes", [[4, 8, 0, 12], [0, 0, 0, 0], [32, 0, 0, 0]])
def test_block_matmul_is_a_ragged_dot(group_sizes: list[int]) -> None:
    sizes = jnp.array(group_sizes, jnp.int32)
    x = jax.random.normal(jax.random.key(2), (32, HIDDEN))
    w = jax.random.normal(jax.random.key(3), (4, HIDDEN, WIDTH))
    used = jnp.arange(32)[:, None] < sizes.sum()

    def loss(x: jax.Array, w: jax.Array, matmul: Any) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.where(used, matmul(x, w, sizes), 0)))

    blocks = functools.partial(nn.block_matmul, block_rows=BLOCK)
    for got, want in zip(
        jax.grad(loss, (0, 1))(x, w, blocks),
        jax.grad(loss, (0, 1))(x, w, jax.lax.ragged_dot),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_block_matmul_says_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="block_rows=5"):
        nn.block_matmul(
            jnp.ones((12, 2)), jnp.ones((1, 2, 2)), jnp.array([12], jnp.int32), block_rows=5
        )
