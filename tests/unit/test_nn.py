# SPDX-License-Identifier: Apache-2.0
"""The MoE layers against the same layer written without any expert parallelism."""

import dataclasses
import functools
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jax_smfree as smfree
from jax_smfree import nn
from jax_smfree.nn import matmul
from support import as_many, ep_mesh

NUM_RANKS, NUM_EXPERTS, TOP_K = 4, 8, 2
HIDDEN, WIDTH, TOKENS = 16, 24, 12
BLOCK = 4
ROUTER = nn.RouterConfig(TOP_K)
P = PartitionSpec


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return ep_mesh(as_many(NUM_RANKS))


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
    return jax.random.normal(jax.random.key(seed), (as_many(NUM_RANKS) * TOKENS, HIDDEN))


def dense_layer(params: nn.MoeParams, x: jax.Array, bias: jax.Array | None = None) -> Any:
    """Every expert on every row, weighted with zero where the router did not choose it."""
    routes = nn.route(x, params.router, ROUTER, balance_bias=bias)
    all_outputs = jax.vmap(nn.mlp, in_axes=(None, 0), out_axes=1)(x, params.experts)
    weights = jnp.zeros((x.shape[0], NUM_EXPERTS))
    weights = weights.at[jnp.arange(x.shape[0])[:, None], routes.topk_idx].set(routes.topk_weights)
    out = jnp.einsum("te,teh->th", weights, all_outputs)
    load = nn.expert_load(routes.topk_idx, NUM_EXPERTS)
    return (out if params.shared is None else out + nn.mlp(x, params.shared)), load


def sharded(group: Any, body: Any, *, check_vma: bool = True) -> Any:
    """``body(params, x) -> (out, aux)`` over the mesh; aux gets a leading rank axis."""

    def on_each_rank(params: nn.MoeParams, x: jax.Array) -> Any:
        out, aux = body(params, x)
        return out, jax.tree.map(lambda a: a[None], aux)

    def over_the_mesh(params: nn.MoeParams, x: jax.Array) -> Any:
        return jax.shard_map(
            on_each_rank,
            mesh=group.mesh,
            in_specs=(nn.moe_specs(params, "ep"), P("ep")),
            out_specs=(P("ep"), P("ep")),
            check_vma=check_vma,
        )(params, x)

    return over_the_mesh


def run(layer: Any, params: nn.MoeParams, x: jax.Array) -> Any:
    """Output, gradients and aux of ``layer``, for a loss that is not symmetric in anything."""

    def loss(params: nn.MoeParams, x: jax.Array) -> Any:
        out, aux = layer(params, x)
        weights = jnp.arange(out.size).reshape(out.shape) / out.size
        return jnp.sum(jnp.sin(out) * weights), (out, aux)

    gradients, (out, aux) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return (out, gradients), aux


def assert_close(got: Any, want: Any) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5), got, want)


@pytest.mark.parametrize(
    ("implementation", "shared"), [("smfree", True), ("smfree", False), ("reference", True)]
)
def test_layer_and_its_gradients_equal_the_dense_layer(
    group: Any, implementation: Any, shared: bool
) -> None:
    params, x = make_params(shared=shared), make_rows()

    def body(params: nn.MoeParams, x: jax.Array) -> Any:
        token = group.token()
        token, out, aux = nn.moe_layer(token, params, x, implementation=implementation)
        assert token.state is None and token.group is group
        return out, aux

    results, _ = run(sharded(group, body), params, x)
    expected, _ = run(dense_layer, params, x)
    assert_close(results, expected)


@pytest.mark.parametrize("implementation", ["smfree", "reference"])
def test_layer_with_options_and_without_varying_types(group: Any, implementation: Any) -> None:
    params, x = make_params(), make_rows()
    bias = jnp.linspace(-0.1, 0.1, NUM_EXPERTS)
    options = {
        "balance_bias": bias,
        "grouped_matmul": functools.partial(nn.block_matmul, block_rows=BLOCK),
        "implementation": implementation,
    }

    def body(params: nn.MoeParams, x: jax.Array) -> Any:
        return nn.moe_layer(group.token(), params, x, **options)[1:]

    results, aux = run(sharded(group, body, check_vma=False), params, x)
    expected, load = run(functools.partial(dense_layer, bias=bias), params, x)
    assert_close(results, expected)
    np.testing.assert_array_equal(aux.load.sum(axis=0), load)
    assert not aux.num_dropped.any()


@pytest.mark.parametrize(
    ("implementation", "shared"), [("smfree", True), ("smfree", False), ("reference", True)]
)
def test_two_batches_equal_the_dense_layer(group: Any, implementation: Any, shared: bool) -> None:
    params, x = make_params(shared=shared), make_rows()

    def body(params: nn.MoeParams, x: jax.Array) -> Any:
        tokens = (group.token(0), group.token(1))
        tokens, outs, auxs = nn.moe_two_batches(
            tokens, params, tuple(jnp.split(x, 2)), implementation=implementation
        )
        assert [token.lane for token in tokens] == [0, 1]
        return jnp.concatenate(outs), auxs

    results, auxs = run(sharded(group, body), params, x)
    expected, load = run(dense_layer, params, x)
    assert_close(results, expected)
    np.testing.assert_array_equal(sum(aux.load.sum(axis=0) for aux in auxs), load)


def test_two_batches_are_of_one_group(group: Any) -> None:
    configs = (group.config, dataclasses.replace(group.config, max_tokens=1))
    tokens = tuple(nn.ReferenceGroup("ep", config).token() for config in configs)
    xs = (make_rows(), make_rows())
    with pytest.raises(ValueError, match="tokens of two groups, expected two lanes of one"):
        nn.moe_two_batches(tokens, make_params(), xs, implementation="reference")


def test_reference_needs_no_group(mesh: Mesh, group: Any) -> None:
    params, x = make_params(), make_rows()
    stand_in = nn.ReferenceGroup("ep", group.config)

    def body(params: nn.MoeParams, x: jax.Array) -> jax.Array:
        return nn.moe_layer(stand_in.token(), params, x, implementation="reference")[1]

    specs = nn.moe_specs(params, "ep")
    layer = jax.shard_map(body, mesh=mesh, in_specs=(specs, P("ep")), out_specs=P("ep"))
    assert_close(jax.jit(layer)(params, x), dense_layer(params, x)[0])


def test_unknown_implementation_is_refused(group: Any) -> None:
    token = nn.ReferenceGroup("ep", group.config).token()
    with pytest.raises(ValueError, match="implementation='magic'"):
        nn.moe_layer(token, make_params(), make_rows(), implementation="magic")  # type: ignore[arg-type]


def test_route_chooses_by_score_and_weighs_by_probability() -> None:
    x, router_weights = make_rows(), make_params().router
    bias = jnp.zeros(NUM_EXPERTS).at[3].set(2.0)
    routes = nn.route(x, router_weights, ROUTER, balance_bias=bias)
    assert (routes.topk_idx[:, 0] == 3).all(), "a bias above 1 wins everywhere"
    np.testing.assert_allclose(routes.topk_weights.sum(-1), 1, rtol=1e-6)
    chosen = jnp.take_along_axis(routes.probabilities, routes.topk_idx, axis=-1)
    ratio = chosen / routes.topk_weights
    np.testing.assert_allclose(ratio, ratio[:, :1].repeat(TOP_K, axis=1), rtol=1e-5)


def test_load_balancing_loss_is_one_when_balanced_and_e_when_collapsed() -> None:
    idx = jnp.arange(TOKENS * TOP_K, dtype=jnp.int32).reshape(TOKENS, TOP_K) % NUM_EXPERTS
    uniform = jnp.full((TOKENS, NUM_EXPERTS), 1 / NUM_EXPERTS)
    routes = nn.Routes(idx, jnp.ones(idx.shape), uniform, uniform)
    np.testing.assert_allclose(nn.load_balancing_loss(routes), 1, rtol=1e-6)
    certain = jnp.zeros((TOKENS, NUM_EXPERTS)).at[:, 0].set(1.0)
    first = jnp.zeros((TOKENS, 1), jnp.int32)
    routes = nn.Routes(first, jnp.ones(first.shape), certain, certain)
    np.testing.assert_allclose(nn.load_balancing_loss(routes), NUM_EXPERTS, rtol=1e-6)


def test_balance_bias_evens_out_the_load() -> None:
    x = make_rows() + 1.0  # a common direction, so that some experts are chosen far too often
    router_weights = make_params().router

    def spread(bias: jax.Array) -> float:
        load = nn.expert_load(
            nn.route(x, router_weights, ROUTER, balance_bias=bias).topk_idx, NUM_EXPERTS
        )
        return float(jnp.std(load) / jnp.mean(load))

    @jax.jit
    def step(bias: jax.Array, _: None) -> tuple[jax.Array, None]:
        load = nn.expert_load(
            nn.route(x, router_weights, ROUTER, balance_bias=bias).topk_idx, NUM_EXPERTS
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

    def loss(x: jax.Array, w: jax.Array, multiply: Any) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.where(used, multiply(x, w, sizes), 0)))

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


def poisoned_operands(group_sizes: list[int], dtype: Any) -> tuple[jax.Array, ...]:
    """x, w, group_sizes and dy, with NaN in the rows of no group of x and dy."""
    sizes, rows = jnp.array(group_sizes, jnp.int32), 150
    x = jax.random.normal(jax.random.key(4), (rows, 128)).astype(dtype)
    w = jax.random.normal(jax.random.key(5), (sizes.size, 128, 384)).astype(dtype)
    dy = jax.random.normal(jax.random.key(6), (rows, 384)).astype(dtype)
    unused = jnp.arange(rows)[:, None] >= sizes.sum()
    return jnp.where(unused, jnp.nan, x), w, sizes, jnp.where(unused, jnp.nan, dy)


def forward_and_backward(multiply: Any, operands: tuple[jax.Array, ...]) -> Any:
    x, w, sizes, dy = operands
    out, pullback = jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)
    dx, dw = pullback(dy)
    return out[: sizes.sum()], dx[: sizes.sum()], dw


def test_grouped_matmul_of_other_types_is_a_ragged_dot() -> None:
    operands = poisoned_operands([0, 70, 1, 0, 66], jnp.float32)
    results = (
        forward_and_backward(multiply, operands)
        for multiply in (nn.grouped_matmul, jax.lax.ragged_dot)
    )
    jax.tree.map(np.testing.assert_array_equal, *results)


def on(device_kind: str) -> Any:
    """What a ``shard_map`` over such devices says to the functions inside of it."""
    device = jax.sharding.AbstractDevice(f"NVIDIA {device_kind}", num_cores=2, platform="gpu")
    manual = (jax.sharding.AxisType.Manual,)
    mesh = jax.sharding.AbstractMesh((1,), ("ep",), axis_types=manual, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("device_kind", "hidden", "width", "dtype", "kernel"),
    [
        ("H100 80GB HBM3", 128, 256, jnp.bfloat16, True),
        ("GH200 480GB", 256, 128, jnp.float16, True),
        ("H200", 128, 128, jnp.float32, False),
        ("H200", 192, 128, jnp.bfloat16, False),
        ("H200", 128, 64, jnp.bfloat16, False),
        ("A100-SXM4-80GB", 128, 128, jnp.bfloat16, False),
        ("B200", 128, 128, jnp.bfloat16, False),
    ],
)
def test_choice_of_the_grouped_matmul(
    device_kind: str, hidden: int, width: int, dtype: Any, kernel: bool
) -> None:
    x, w = jnp.ones((8, hidden), dtype), jnp.ones((2, hidden, width), dtype)
    group_sizes = jnp.ones(2, jnp.int32)
    matmul._kernels.cache_clear()  # which warns once
    too_old = jax.__version_info__ < (0, 11)
    warns = (
        pytest.warns(UserWarning, match="need JAX 0.11") if kernel and too_old else nullcontext()
    )
    with on(device_kind), warns:
        jaxpr = jax.make_jaxpr(nn.grouped_matmul)(x, w, group_sizes)
    assert ("ragged_dot" in str(jaxpr)) is not (kernel and not too_old)
