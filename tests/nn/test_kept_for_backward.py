# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps of each received row for its backward pass, and what it computes again."""

import collections
import functools

import jax
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import nn
from nn.models import EXPERTS, HIDDEN, MODELS, WIDTH, params_of, rows
from support import as_many, assert_trees_close, ep_mesh

RECEIVED = 56  # rows on a rank: of no other array's size
ROWS, MLP = smfree.save_comm_policy, nn.save_mlp_policy
BOTH = jax.checkpoint_policies.save_from_both_policies(ROWS, MLP)
PLAIN = "no checkpoint"


def make_layer(groups, model, weight_on, policy):
    """``layer(params, x) -> out`` on global arrays."""
    group = groups(
        ep_mesh(as_many(4)), num_experts=EXPERTS, hidden=HIDDEN, top_k=2, max_tokens=8,
        dtype="float32", recv_capacity=RECEIVED,
    )  # fmt: skip
    given = {"router": model.router} | model.options | {"weight_on": weight_on}

    def of_rank(params, x):
        return nn.moe_layer(group.token(), params, x, **given)[1]

    if policy != PLAIN:
        of_rank = jax.checkpoint(of_rank, policy=policy)

    def layer(params, x):
        specs = nn.moe_specs(params, "ep"), P("ep")
        return jax.shard_map(of_rank, mesh=group.mesh, in_specs=specs, out_specs=P("ep"))(params, x)

    return layer


def widths_kept(layer, params, x):
    """How many floats per received row, of arrays that are as wide as rows or as gate and up."""
    _, pullback = jax.eval_shape(lambda params, x: jax.vjp(layer, params, x), params, x)
    ranks = as_many(4)
    return collections.Counter(
        leaf.shape[1]
        for leaf in jax.tree.leaves(pullback)
        if leaf.shape[:1] == (ranks * RECEIVED,) and leaf.shape[1:] in ((HIDDEN,), (WIDTH,))
    )


def count(jaxpr, name):
    """Equations of a primitive, those inside of others included."""
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr)]
    inner = [getattr(p, "jaxpr", p) for p in inner if is_jaxpr(p)]
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(
        count(each, name) for each in inner
    )


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


@pytest.mark.parametrize(
    ("weight_on", "policy", "kept", "matmuls", "dispatches"),
    [
        ("hidden", BOTH, {HIDDEN: 1, WIDTH: 2}, 9, 1),
        ("hidden", MLP, {WIDTH: 2}, 9, 2),
        ("hidden", ROWS, {HIDDEN: 1}, 11, 1),
        ("hidden", None, {}, 11, 2),
        ("output", BOTH, {HIDDEN: 1, WIDTH: 2}, 10, 1),
        ("output", None, {}, 12, 2),
    ],
    ids=["hidden-both", "hidden-mlp", "hidden-rows", "hidden-none", "output-both", "output-none"],
)
def test_policies(groups, weight_on, policy, kept, matmuls, dispatches):
    """Three matmuls forward and six backward, and those that are done again."""
    model = MODELS["qwen2_moe"]
    params, x = params_of(model), rows(as_many(4) * 8)
    layer = make_layer(groups, model, weight_on, policy)
    assert widths_kept(layer, params, x) == kept
    of_loss = jax.make_jaxpr(jax.grad(lambda *args: layer(*args).sum(), (0, 1)))(params, x)
    assert count(of_loss.jaxpr, "ragged_dot_general") == matmuls
    assert count(of_loss.jaxpr, "smfree_dispatch_send") == dispatches


@pytest.mark.parametrize(("weight_on", "wide"), [("output", 2), ("hidden", 1)])
def test_results_are_kept_for_the_gradient_of_weights(groups, weight_on, wide):
    """What the experts return is needed only where weights multiply it."""
    model = MODELS["qwen2_moe"]
    params, x = params_of(model), rows(as_many(4) * 8)
    layer = make_layer(groups, model, weight_on, PLAIN)
    assert widths_kept(layer, params, x)[HIDDEN] == wide


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("policy", [PLAIN, BOTH, MLP, None], ids=["plain", "both", "mlp", "none"])
def test_same_results(groups, name, policy):
    """Of weights on what goes into the last matmul, with and without biases."""
    model = MODELS[name]
    params, x = params_of(model), rows(as_many(4) * 8)

    def results(weight_on, policy):
        layer = make_layer(groups, model, weight_on, policy)
        of = jax.value_and_grad(lambda *args: jax.numpy.sin(layer(*args)).sum(), (0, 1))
        return jax.jit(of)(params, x)

    assert_trees_close(results("hidden", policy), results("output", PLAIN))


def test_padded(groups):
    """Also where rows past the groups may be NaN, weights included."""
    model, mesh = MODELS["gpt_oss"], ep_mesh(as_many(4))
    sizes = {"num_experts": EXPERTS, "hidden": HIDDEN, "top_k": 2, "max_tokens": 8}
    group = groups(mesh, **sizes, dtype="float32", layout="padded")
    params, x = params_of(model), rows(mesh.size * 8)

    def results(weight_on, implementation):
        options = model.options | {"weight_on": weight_on, "implementation": implementation}
        layer = functools.partial(nn.moe_layer_on_mesh, group, router=model.router, **options)
        of = jax.value_and_grad(lambda *args: jax.numpy.sin(layer(*args)[0]).sum(), (0, 1))
        return jax.jit(of)(params, x)

    assert_trees_close(results("hidden", "smfree"), results("output", "reference"))


def test_experts_without_weights(groups):
    group = groups(
        ep_mesh(as_many(4)), num_experts=EXPERTS, hidden=HIDDEN, top_k=2, max_tokens=8,
        dtype="float32",
    )  # fmt: skip

    def experts(x, group_sizes, local_expert, params):
        return x

    with pytest.raises(TypeError, match=r"weight_on='hidden' and experts .* that take weights="):
        nn.moe_layer_on_mesh(
            group, params_of(MODELS["qwen2_moe"]), rows(8), experts=experts, weight_on="hidden"
        )
