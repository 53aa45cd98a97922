# SPDX-License-Identifier: Apache-2.0
"""The layers of real models in the padded layout: as in the grouped one, whatever is in padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_smfree import nn
from nn.models import EXPERTS, HIDDEN, MODELS, by_loop, gradients, params_of, rows
from support import as_many, assert_trees_close, ep_mesh

SIZES = {"num_experts": EXPERTS, "hidden": HIDDEN, "max_tokens": 32, "dtype": jnp.float32}


@jax.custom_vjp
def with_nans(x, in_a_group):
    """NaN in the rows outside of groups, and backward in their gradients."""
    return jnp.where(in_a_group, x, jnp.nan)


with_nans.defvjp(
    lambda x, in_a_group: (with_nans(x, in_a_group), in_a_group),
    lambda in_a_group, ct: (jnp.where(in_a_group, ct, jnp.nan), None),
)


def amid_nans(experts):
    """``experts`` that get NaN in their padding and in the gradients of their results there."""

    def of_rows(x, group_sizes, local_expert, params):
        assert x.ndim == 3 and local_expert.shape == x.shape[:2]
        in_a_group = (local_expert < group_sizes.shape[0])[..., None]
        y = experts(with_nans(x, in_a_group), group_sizes, local_expert, params)
        return with_nans(y, in_a_group)

    return of_rows


@pytest.mark.parametrize(
    ("name", "alignment"), [("qwen2_moe", 1), ("gpt_oss", 1), ("llama4", 4), ("nemotron_h", 3)]
)
def test_of_models(groups, name, alignment):
    """With and without biases and gates, and with the weights on what experts get."""
    model = MODELS[name]
    group = groups(
        ep_mesh(as_many(4)), **SIZES, top_k=model.router.top_k, layout="padded",
        expert_alignment=alignment,
    )  # fmt: skip
    given = {"router": model.router, "experts": nn.grouped_mlp} | model.options
    given["experts"] = amid_nans(given["experts"])
    params, x = params_of(model), rows(4 * 8)
    layer = functools.partial(nn.moe_layer_on_mesh, group, **given)
    got, aux = gradients(layer, params, x)
    expected, load = gradients(functools.partial(by_loop, model), params, x)
    assert_trees_close(got, expected)
    np.testing.assert_array_equal(aux.load, load)


def test_two_batches_with_capacities(groups):
    """What does not fit into the part of its expert is left out of outputs and gradients."""
    model, mesh = MODELS["deepseek_v3"], ep_mesh(as_many(4))
    options = {"top_k": 2, "layout": "padded", "overflow": "drop", "num_lanes": 2}
    local = EXPERTS // mesh.size
    group = groups(mesh, **SIZES, **options, recv_capacity=3 * local, wire_capacity=64)
    params, x = params_of(model), rows(mesh.size * 16)

    def layer(implementation, params, x):
        def on_each_rank(params, x):
            tokens, xs = (group.token(0), group.token(1)), tuple(jnp.split(x, 2))
            given = {"router": model.router, "implementation": implementation}
            _, outs, auxs = nn.moe_two_batches(tokens, params, xs, **given)
            return jnp.concatenate(outs), sum(aux.num_dropped for aux in auxs)[None]

        specs = nn.moe_specs(params, "ep"), P("ep")
        return jax.shard_map(on_each_rank, mesh=mesh, in_specs=specs, out_specs=P("ep"))(params, x)

    got, dropped = gradients(functools.partial(layer, "smfree"), params, x)
    expected, expected_dropped = gradients(functools.partial(layer, "reference"), params, x)
    assert_trees_close(got, expected)
    np.testing.assert_array_equal(dropped, expected_dropped)
    assert dropped.sum() > 0


def test_no_grouped_matmul(groups):
    group = groups(ep_mesh(as_many(4)), **SIZES, top_k=2, layout="padded")
    model = MODELS["qwen2_moe"]
    with pytest.raises(ValueError, match=r"got a grouped_matmul for .*layout='padded', expected N"):
        nn.moe_layer_on_mesh(group, params_of(model), rows(8), grouped_matmul=nn.grouped_matmul)


def test_experts_alone():
    """Rows past the groups come out as zero; shapes are checked."""
    params = params_of(MODELS["gpt_oss"]).experts
    sizes = jnp.arange(EXPERTS, dtype=jnp.int32) % 4
    x = rows(EXPERTS, 3)
    experts = jnp.where(jnp.arange(3) < sizes[:, None], jnp.arange(EXPERTS)[:, None], EXPERTS)
    y = nn.grouped_mlp(x, sizes, experts, params)
    expected = jnp.where((experts < EXPERTS)[..., None], jax.vmap(nn.mlp)(x, params), 0)
    assert_trees_close(y, expected)
    with pytest.raises(ValueError, match=r"x\[4, 3, 16\], expected x\[8, C, H\]"):
        nn.grouped_mlp(x[:4], sizes, experts, params)
    with pytest.raises(ValueError, match=r"local_expert\[24\], expected local_expert\[8, 3\]"):
        nn.grouped_mlp(x, sizes, experts.reshape(-1), params)
