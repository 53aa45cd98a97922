# SPDX-License-Identifier: Apache-2.0
"""The layers of real models against plain loops over their experts, with gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_smfree import nn
from nn.models import (
    EXPERTS,
    HIDDEN,
    MODELS,
    WIDTH,
    by_loop,
    gradients,
    one_mlp,
    params_of,
    poisoned_matmul,
    rows,
)
from support import as_many, assert_trees_close, devices, ep_mesh

BLOCK = 4


def group_for(groups, model, mesh=None, **options):
    """However many ranks there are, the rows of a test fit, and leave some room."""
    mesh = ep_mesh(as_many(4)) if mesh is None else mesh
    config = {"num_experts": EXPERTS, "top_k": model.router.top_k, "hidden": HIDDEN,
              "max_tokens": 64 // mesh.shape["ep"], "dtype": jnp.float32,
              "expert_alignment": BLOCK}  # fmt: skip
    return groups(mesh, **config | options)


def bias_of(model):
    return jnp.linspace(-0.2, 0.2, EXPERTS) if model.balanced else None


def on_mesh(group, model, **options):
    """The layer with a grouped matmul that leaves NaN where it may."""
    given = {"router": model.router, "grouped_matmul": poisoned_matmul} | model.options | options

    def layer(params, x):
        return nn.moe_layer_on_mesh(group, params, x, **given)

    return layer


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma"])  # in a scan, below
def test_of_models(groups, name):
    model = MODELS[name]
    group, bias = group_for(groups, model), bias_of(model)
    params, x = params_of(model), rows(4 * 12)
    got, aux = gradients(on_mesh(group, model, balance_bias=bias), params, x)
    expected, load = gradients(functools.partial(by_loop, model, bias=bias), params, x)
    assert_trees_close(got, expected)
    np.testing.assert_array_equal(aux.load, load)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("name", ["llama4", "gpt_oss"])
def test_of_models_by_the_reference(groups, name):
    """Plain jax.numpy in place of dispatch and combine has the same values."""
    model = MODELS[name]
    group, params, x = group_for(groups, model), params_of(model), rows(4 * 12)
    out, _ = jax.jit(on_mesh(group, model, implementation="reference"))(params, x)
    assert_trees_close(out, jax.jit(functools.partial(by_loop, model))(params, x)[0])


def test_batches_of_sequences_with_padding_and_routes(groups):
    """[B, S, H] with a number of rows that does not divide, and routes from outside."""
    model = MODELS["qwen2_moe"]
    group, params, x = group_for(groups, model), params_of(model), rows(3, 7)
    rng = np.random.default_rng(2)
    idx = jnp.asarray(np.argsort(rng.random((3, 7, EXPERTS)))[..., :2], jnp.int32)
    mask = jnp.asarray(rng.random((3, 7)) < 0.7)
    x = jnp.where(mask[..., None], x, jnp.nan)  # padding may be anything
    weights = jnp.asarray(rng.random((3, 7, 2)), jnp.float32)
    scores = jnp.full((3, 7, EXPERTS), 1 / EXPERTS)
    routes = nn.Routes(idx.at[0, :3, 1].set(-1), weights, scores, scores)

    def expected_of(params, x):
        flat = jax.tree.map(lambda leaf: leaf.reshape(21, -1), (x, routes))
        x, flat_routes = jnp.where(mask.reshape(21, 1), flat[0], 0), flat[1]
        out, load = by_loop(model, params, x, routes=flat_routes)
        return jnp.where(mask[..., None], out.reshape(3, 7, -1), 0), load

    got, aux = gradients(on_mesh(group, model, routes=routes, mask=mask), params, x)
    expected, _ = gradients(expected_of, params, x)
    assert_trees_close(got, expected)
    counted = jnp.where(mask[..., None], routes.topk_idx, -1).reshape(21, 2)
    np.testing.assert_array_equal(aux.load, nn.expert_load(counted, EXPERTS))


def test_decode_with_fewer_rows_than_ranks(groups):
    model = MODELS["deepseek_v3"]
    group, params, x = group_for(groups, model), params_of(model), rows(1, 1)
    out, aux = jax.jit(on_mesh(group, model))(params, x)
    assert_trees_close(out[0], by_loop(model, params, x[0])[0])
    assert int(aux.load.sum()) == 2
    # Of the rank that has the row: the others, which have none, are not in the mean.
    routes = nn.route(x[0], params.router, model.router)
    assert_trees_close(aux.load_balancing_loss, nn.load_balancing_loss(routes))


@pytest.mark.parametrize(("name", "kind"), [("gpt_oss", "auto"), ("nemotron_h", "explicit")])
def test_parameters_over_further_axes(groups, name, kind):
    """Gathered over an axis of FSDP, kept split over a tensor axis; gradients come out so."""
    if as_many(8) < 8:
        pytest.skip("needs 8 devices")
    axis_types = (jax.sharding.AxisType[kind.capitalize()],) * 3
    mesh = Mesh(devices(8).reshape(2, 2, 2), ("data", "ep", "tensor"), axis_types=axis_types)
    model = MODELS[name]
    group, params, x = group_for(groups, model, mesh), params_of(model), rows(3, 7)
    specs = nn.moe_specs(params, "ep", fsdp_axis="data", tensor_axis="tensor")
    place = functools.partial(jax.sharding.NamedSharding, mesh)
    on_devices = jax.device_put(params, jax.tree.map(place, specs))
    layer = on_mesh(group, model, params_spec=specs, tensor_axis="tensor")

    def flat_loop(params, x):
        out, load = by_loop(model, params, x.reshape(-1, HIDDEN))
        return out.reshape(x.shape), load

    x_here = jax.device_put(x, place(P())) if kind == "explicit" else x
    got, aux = gradients(layer, on_devices, x_here)
    expected, load = gradients(flat_loop, params, x)
    assert_trees_close(got, expected)
    np.testing.assert_array_equal(aux.load, load)
    (of_params, _) = got[1]
    assert of_params.experts.up.sharding.spec == P("ep", "data", "tensor")


def test_layers_in_a_scan(groups):
    """Stacked parameters, of which the first axis is that of the layers."""
    model = MODELS["gemma"]
    group, x = group_for(groups, model), rows(2, 10)
    layers = [params_of(model, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    specs = nn.moe_specs(stack, "ep")
    assert specs.experts.up == P(None, "ep") and specs.router == P()
    layer = on_mesh(group, model)

    def model_of(stack, x):
        return jax.lax.scan(lambda x, params: (x + layer(params, x)[0], None), x, stack)

    def expected_of(stack, x):
        for i in range(3):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
            out, _ = by_loop(model, params, x.reshape(-1, HIDDEN))
            x = x + out.reshape(x.shape)
        return x, None

    assert_trees_close(gradients(model_of, stack, x)[0], gradients(expected_of, stack, x)[0], 1e-4)


def test_float32_parameters_in_a_group_of_bfloat16(groups):
    model = MODELS["gpt_oss"]
    group, params, x = group_for(groups, model, dtype=jnp.bfloat16), params_of(model), rows(20)
    x, layer = x.astype(jnp.bfloat16), on_mesh(group, model)
    (out, (of_masters, _)), _ = gradients(layer, params, x)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params.experts)
    cast = nn.MoeParams(params.router, cast, None, params.router_bias)
    (expected, (of_cast, _)), _ = gradients(layer, cast, x)
    np.testing.assert_array_equal(np.float32(out), np.float32(expected))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(of_masters)} == {"float32"}
    # The compiler leaves out that gradients are rounded to bfloat16 and back.
    assert_trees_close(of_masters, jax.tree.map(np.float32, of_cast), 2**-8)


def lora(x, group_sizes, local_expert, params, *, grouped_matmul=nn.grouped_matmul):
    """The MLP of each expert, plus ``scale * x @ a @ b`` of its own."""
    y = nn.grouped_mlp(x, group_sizes, local_expert, params["mlp"], grouped_matmul=grouped_matmul)
    low = grouped_matmul(grouped_matmul(x, params["a"], group_sizes), params["b"], group_sizes)
    return y + params["scale"].at[local_expert].get(mode="fill", fill_value=0)[:, None] * low


def test_experts_of_ones_own(groups):
    """With parameters of another structure, which knows the expert of each row."""
    model = MODELS["deepseek_v3"]
    group, params, x = group_for(groups, model), params_of(model), rows(20)
    rng = np.random.default_rng(3)
    shapes = {"a": (EXPERTS, HIDDEN, 4), "b": (EXPERTS, 4, HIDDEN), "scale": (EXPERTS,)}
    adapters = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    own = nn.MoeParams(params.router, {"mlp": params.experts} | adapters, params.shared)

    def expected_of(params, x):
        routes, out = nn.route(x, params.router, model.router), one_mlp(model, params.shared, x)
        for e in range(EXPERTS):
            of = jax.tree.map(lambda leaf, e=e: leaf[e], params.experts)
            y = one_mlp(model, of["mlp"], x) + of["scale"] * (x @ of["a"] @ of["b"])
            weight = jnp.where(routes.topk_idx == e, routes.topk_weights, 0).sum(axis=1)
            out = out + weight[:, None] * y
        return out, None

    got, _ = gradients(on_mesh(group, model, experts=lora), own, x)
    assert_trees_close(got, gradients(expected_of, own, x)[0])


def test_two_batches_take_the_same_arguments(groups):
    model = MODELS["llama4"]
    group, params, x = group_for(groups, model, num_lanes=2), params_of(model), rows(4 * 12)
    mask = jnp.arange(4 * 12) % 5 > 0
    routes = nn.balanced_routes(4 * 12, EXPERTS, 1)
    half = 4 * 12 // group.num_ranks // 2
    options = {"router": model.router, "grouped_matmul": poisoned_matmul, **model.options}

    def on_each_rank(params, x, mask, routes):
        tokens, xs, masks = (group.token(0), group.token(1)), jnp.split(x, 2), jnp.split(mask, 2)
        second = jax.tree.map(lambda leaf: leaf[half:], routes)
        _, outs, _ = nn.moe_two_batches(
            tokens, params, tuple(xs), masks=tuple(masks), routes=(None, second), **options
        )
        return jnp.concatenate(outs)

    def layer(params, x):
        specs = (nn.moe_specs(params, "ep"), P("ep"), P("ep"), P("ep"))
        body = jax.shard_map(on_each_rank, mesh=group.mesh, in_specs=specs, out_specs=P("ep"))
        return body(params, x, mask, routes), None

    def expected_of(params, x):
        by_router = nn.route(x, params.router, model.router)
        of_second = (jnp.arange(4 * 12) % (2 * half) >= half)[:, None]
        mixed = jax.tree.map(lambda a, b: jnp.where(of_second, a, b), routes, by_router)
        out, _ = by_loop(model, params, x, routes=mixed)
        return jnp.where(mask[:, None], out, 0), None

    assert_trees_close(gradients(layer, params, x)[0], gradients(expected_of, params, x)[0])


def test_copies_of_experts(groups):
    """Values, gradients, load and loss are those without copies."""
    model, placement = MODELS["deepseek_v3"], nn.ExpertPlacement((*range(EXPERTS), 0, 3, 3, 5))
    group, params, x = group_for(groups, model, num_experts=12), params_of(model), rows(20)
    layer = on_mesh(group, model, placement=placement)

    def with_copies(params, x):
        experts = nn.move_parameters(params.experts, None, placement)
        return layer(dataclasses.replace(params, experts=experts), x)

    got, aux = gradients(with_copies, params, x)
    expected, load = gradients(functools.partial(by_loop, model), params, x)
    assert_trees_close(got, expected)
    np.testing.assert_array_equal(aux.load, load)


def test_axes_that_are_gathered_stand_behind_the_others(groups):
    """In an entry of a spec, because the parts of a device then are neighbours."""
    model = MODELS["gemma"]
    mesh = Mesh(devices(4).reshape(2, 2), ("data", "ep"))
    group, params, x = group_for(groups, model, mesh), params_of(model), rows(4)
    specs = jax.tree.map(lambda _: P(), params)

    def traced(*entry):
        experts = jax.tree.map(lambda _: P(entry), params.experts)
        spec = dataclasses.replace(specs, experts=experts)
        layer = functools.partial(nn.moe_layer_on_mesh, group, params_spec=spec)
        return jax.eval_shape(layer, params, x)[0].shape

    assert traced("ep", "data") == x.shape
    with pytest.raises(ValueError, match=r"got .*'data', 'ep'.*, expected 'data' behind"):
        traced("data", "ep")


def test_what_does_not_fit_is_told(groups):
    model = MODELS["gemma"]
    group, params, x = group_for(groups, model), params_of(model), rows(4)
    layer = functools.partial(nn.moe_layer_on_mesh, group, params)
    routes = nn.balanced_routes(4, EXPERTS, 2)
    wrong = [
        ({"router": nn.RouterConfig(3)}, r"router with top_k=3, expected .* EpConfig, 2"),
        ({"tensor_axis": "ep"}, r"tensor_axis=.* expected axes of the mesh beside the group's"),
        ({"params_spec": params}, r"params_spec, expected a PartitionSpec for every array"),
        ({"mask": jnp.ones(3, bool)}, r"got mask\[3\], expected mask\[4\]"),
        ({"routes": routes, "balance_bias": jnp.ones(EXPERTS)}, "expected one of them"),
        ({"experts": lambda x, *_: x[:, :1]}, r"result of experts\[\d+, 1\], expected"),
        ({"placement": nn.ExpertPlacement((0, 1))}, "placement of 2 copies, expected as many"),
        ({"weight_on": "both"}, "weight_on='both', expected 'output', 'hidden' or 'input'"),
    ]  # fmt: skip
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(layer, **options), x)
    short = nn.MoeParams(params.router, {"w": jnp.ones((3, WIDTH))})
    with pytest.raises(ValueError, match=r"got params.experts\['w'\]\[3, 24\].*first axis"):
        nn.moe_layer_on_mesh(group, short, x)
