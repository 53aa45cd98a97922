# SPDX-License-Identifier: Apache-2.0
"""Calls that no data order, from fresh tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
from jax_smfree._src import reference
from support import (
    as_many,
    assert_trees_close,
    backend,
    block,
    chaos_on_cpu,
    ep_mesh,
    in_both_modes,
    make_problem,
    reference_of,
)
from unordered_calls import (
    PROGRAMS,
    eight_gradients,
    eight_inputs,
    one_call,
    one_gradient,
    program_of,
    steps_in_a_loop,
)

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@in_both_modes
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_programs(groups, program):
    """Right against the reference; and the same bits from run to run, whatever moves first."""
    group = groups(ep_mesh(as_many(4, at_least=2)), **CONFIG)
    problem = make_problem(group.mesh)
    run = program_of(program, smfree, group.token, problem)
    actual = run(*problem.arrays)
    expected = program_of(program, reference, reference_of(group).token, problem)
    assert_trees_close(actual, expected(*problem.arrays))
    for seed in range(3):
        assert_same(run(*problem.arrays), actual)
        with chaos_on_cpu(group, seed=seed, max_delay_us=300):
            assert_same(run(*problem.arrays), actual)
    group.check()


@pytest.mark.parametrize("at_most", [4, 8])
@pytest.mark.parametrize(
    "eight, one",
    [(eight_inputs, one_call), (eight_gradients, one_gradient)],
    ids=["calls", "gradients"],
)
def test_bits_of_ordered_calls(groups, eight, one, at_most):
    """Eight calls in one program, and one after the other in programs of their own.

    For GPUs XLA compiles the same arithmetic differently in another program.
    """
    group = groups(ep_mesh(as_many(at_most, at_least=2)), **CONFIG)
    problem = make_problem(group.mesh)
    together, alone = (program_of(p, smfree, group.token, problem) for p in (eight, one))
    x, *others = problem.arrays
    expected = [np.asarray(alone(factor * x, *others)) for factor in range(1, 9)]
    same = assert_same if backend() == "cpu" else assert_trees_close
    for _ in range(10):
        same(together(*problem.arrays), expected)


def test_a_kept_token(groups):
    """A custom_vjp that keeps its token, in the middle of a model, and uses it again."""
    group = groups(ep_mesh(as_many(4, at_least=2)), **CONFIG)
    problem = make_problem(group.mesh)

    def model(ops, token, again):
        layer = functools.partial(block, ops)
        middle = jax.custom_vjp(layer)
        middle.defvjp(
            lambda *arguments: (layer(*arguments), arguments),
            lambda kept, cotangents: jax.vjp(layer, *kept)[1](cotangents),
        )

        def local(x, *arrays):
            token_, x = layer(token(), x, *arrays)
            token_, x = (middle if again else layer)(token_, x, *arrays)
            return jnp.sum(layer(token_, x, *arrays)[1] ** 2)[None]

        smap = jax.shard_map(
            local, mesh=problem.mesh, in_specs=problem.specs, out_specs=problem.rows
        )
        return jax.jit(jax.grad(lambda *arrays: jnp.sum(smap(*arrays)), argnums=(0, 2, 3)))

    kept = model(smfree, group.token, again=True)
    expected = model(reference, reference_of(group).token, again=False)(*problem.arrays)
    for seed in range(10):
        with chaos_on_cpu(group, seed=seed, max_delay_us=300):
            assert_trees_close(kept(*problem.arrays), expected)
    group.check()


def test_an_exported_program(groups):
    """Its value and its gradient, and it called twice."""
    group = groups(ep_mesh(as_many(4, at_least=2)), **CONFIG)
    problem = make_problem(group.mesh)
    layer = program_of(one_call, smfree, group.token, problem)
    export = jax.export.export(layer, disabled_checks=smfree.DISABLE_JAX_EXPORT_CHECKS)
    loaded = jax.export.deserialize(export(*problem.arrays).serialize(vjp_order=2))

    def apart(layer, x, idx, weights, kernel):
        def loss(kernel, factor):
            return jnp.sum(layer(factor * x, idx, weights, kernel) ** 2)

        return [[loss(kernel, factor), jax.grad(loss)(kernel, factor)] for factor in (1.0, -0.5)]

    expected = jax.jit(functools.partial(apart, layer))(*problem.arrays)
    step = jax.jit(functools.partial(apart, loaded.call))
    for _ in range(5):
        assert_trees_close(step(*problem.arrays), expected, 1e-6)
    group.check()


def test_two_programs_compiled_before_either_runs(groups):
    group = groups(ep_mesh(as_many(4, at_least=2)), **CONFIG)
    problem = make_problem(group.mesh)
    programs = [
        program_of(program, smfree, group.token, problem).lower(*problem.arrays).compile()
        for program in (eight_inputs, eight_gradients)
    ]
    expected = [jax.tree.map(np.asarray, program(*problem.arrays)) for program in programs]
    for _ in range(3):
        results = [program(*problem.arrays) for program in programs]  # both under way at once
        assert_same(results, expected)
    group.check()


def test_endurance(groups):
    """Ranks are an iteration apart, and so are their messages."""
    group = groups(ep_mesh(as_many(4, at_least=2)), **CONFIG)
    problem = make_problem(group.mesh)
    run = program_of(steps_in_a_loop, smfree, group.token, problem)
    expected = jax.tree.map(np.asarray, run(*problem.arrays))
    for seed in range(3):
        with chaos_on_cpu(group, seed=seed, max_delay_us=100, stall_probability=1e-4, stall_ms=2):
            assert_same(run(*problem.arrays), expected)
    stats = group.stats()
    assert stats["dispatch_recv_calls"] == stats["dispatch_send_calls"] > 5_000 * group.num_ranks
    group.check()
