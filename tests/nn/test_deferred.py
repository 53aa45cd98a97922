# SPDX-License-Identifier: Apache-2.0
"""Gradients of the experts' parameters, which wait for the send of those of the rows.

The reference, whose operations send nothing, is differentiated as JAX does it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import nn
from nn.models import EXPERTS, HIDDEN, MODELS, params_of, rows
from support import as_many, assert_trees_close, ep_mesh

MODEL = MODELS["gpt_oss"]  # with biases, without a shared expert
BOTH = jax.checkpoint_policies.save_from_both_policies(smfree.save_comm_policy, nn.save_mlp_policy)
WRAPPERS = {
    "plain": lambda layer: layer,
    "checkpoint": jax.checkpoint,
    "policies": functools.partial(jax.checkpoint, policy=BOTH),
}


@pytest.fixture
def group(groups, request):
    return groups(
        ep_mesh(as_many(4)), num_experts=EXPERTS, hidden=HIDDEN, top_k=2, max_tokens=8,
        dtype="float32", layout=getattr(request, "param", "grouped"),
    )  # fmt: skip


def loss_of(group, implementation, wrap=WRAPPERS["plain"], check_vma=True, **options):
    """``loss(params, x, scale)`` of two layers in a scan, on global arrays."""
    given = {"router": MODEL.router, "implementation": implementation} | options

    def on_each_rank(params, x, scale):
        experts = functools.partial(nn.grouped_mlp, activation=nn.clamped_swiglu)
        if scale is not None:  # what experts close over has gradients, too
            experts = functools.partial(
                nn.grouped_mlp, activation=lambda gate, up: jnp.tanh(scale * gate) * up
            )

        @wrap
        def layer(token, params, x):
            token, out, _ = nn.moe_layer(token, params, x, **{"experts": experts} | given)
            return token, x + out

        def body(carry, params):
            return layer(carry[0], params, carry[1]), None

        return jax.lax.scan(body, (group.token(), x), params)[0][1]

    def loss(params, x, scale=None):
        specs = nn.moe_specs(params, "ep"), P("ep"), P()
        model = jax.shard_map(
            on_each_rank, mesh=group.mesh, in_specs=specs, out_specs=P("ep"), check_vma=check_vma
        )
        out = model(params, x, scale)
        return jnp.sum(jnp.sin(out) * jnp.linspace(-1, 1, out.size).reshape(out.shape))

    return loss


def operands():
    layers = [params_of(MODEL, seed) for seed in range(2)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), rows(as_many(4) * 8)


CASES = [
    *itertools.product(["grouped"], ["output", "hidden", "input"], [tuple(WRAPPERS)]),
    ("padded", "output", ("plain",)),
    ("padded", "hidden", ("policies",)),
    ("padded", "input", ("checkpoint",)),
]


@pytest.mark.parametrize(("group", "weight_on", "wrappers"), CASES, indirect=["group"])
def test_gradients(group, weight_on, wrappers):
    def of(*how):
        loss = loss_of(group, *how, weight_on=weight_on)
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(*operands())

    expected = of("reference")
    for wrapper in wrappers:
        assert_trees_close(of("smfree", WRAPPERS[wrapper]), expected)


def test_gradients_without_varying_types(group):
    def of(*how):
        return jax.jit(jax.grad(loss_of(group, *how), (0, 1)))(*operands())

    plain = WRAPPERS["plain"]
    assert_trees_close(of("smfree", plain, False), of("reference", plain, False))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or not hasattr(jax.config, "jax_remat3"),
    reason="no jax_remat3 here, or an unfinished one",
)
def test_the_coming_checkpoint_of_jax(group):
    def gradients():
        return jax.jit(jax.grad(loss_of(group, "smfree", WRAPPERS["policies"]), (0, 1)))

    expected = gradients()(*operands())
    before = jax.config.jax_remat3
    jax.config.update("jax_remat3", True)
    try:
        assert_trees_close(gradients()(*operands()), expected)
    finally:
        jax.config.update("jax_remat3", before)


@pytest.mark.parametrize("what", ["params", "x", "router", "up", "biases"])
def test_where_only_some_of_it_varies(group, what):
    params, x = operands()

    def with_varying(value):
        match what:
            case "params":
                return value, x
            case "x":
                return params, value
            case "router":
                return nn.MoeParams(value, params.experts, None, params.router_bias), x
        names = ("up",) if what == "up" else ("gate_bias", "up_bias", "down_bias")
        fields = vars(params.experts) | dict(zip(names, value, strict=True))
        experts = nn.MlpParams(**fields)
        return nn.MoeParams(params.router, experts, None, params.router_bias), x

    varying = {
        "params": params,
        "x": x,
        "router": params.router,
        "up": [params.experts.up],
        "biases": [getattr(params.experts, f"{name}_bias") for name in ("gate", "up", "down")],
    }[what]

    def of(implementation):
        loss = loss_of(group, implementation)
        return jax.jit(jax.grad(lambda value: loss(*with_varying(value))))(varying)

    assert_trees_close(of("smfree"), of("reference"))


@pytest.mark.parametrize("order", ["first", "second"])
def test_forward_mode(group, order):
    primals = operands()
    tangents = jax.tree.map(jnp.cos, primals)

    def of(implementation):
        function = loss_of(group, implementation)
        if order == "second":
            function = jax.grad(function, (0, 1))
        return jax.jit(functools.partial(jax.jvp, function))(primals, tangents)

    assert_trees_close(of("smfree"), of("reference"), 1e-4)


def test_experts_that_close_over_what_varies(group):
    def of(implementation):
        loss = loss_of(group, implementation)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*operands(), jnp.float32(2))

    assert_trees_close(of("smfree"), of("reference"))


def test_an_activation_runs_no_more_often(group):
    """What it does beside its result, a callback, is not repeated for the parameters."""
    calls = []

    def activation(gate, up):
        jax.debug.callback(lambda: calls.append(None))
        return jnp.tanh(gate) * up

    def number_of_calls(implementation):
        experts = functools.partial(nn.grouped_mlp, activation=activation)
        loss = loss_of(group, implementation, experts=experts)
        calls.clear()
        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1)))(*operands()))
        jax.effects_barrier()
        return len(calls)

    assert number_of_calls("smfree") == number_of_calls("reference") > 0
