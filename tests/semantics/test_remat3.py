# SPDX-License-Identifier: Apache-2.0
"""``jax.checkpoint`` by ``jax_remat3``, the coming default of JAX, does the same as today."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
from jax_smfree import inspect
from semantics.test_transforms import CONFIG, MODES, STRUCTURES, expected_gradients, loss_fn
from support import as_many, assert_trees_close, block, ep_mesh, in_both_modes, make_problem

pytestmark = pytest.mark.skipif(not hasattr(jax.config, "jax_remat3"), reason="no jax_remat3 here")

# In jax 0.10 it is unfinished: a replicated operand fails under check_vma (jax.checkpoint of
# x @ kernel alone does), and what is nested runs again as if it were no replay.
FINISHED = jax.__version_info__ >= (0, 11)
CHECKPOINTS = {
    name: pytest.param(
        name,
        marks=pytest.mark.skipif(
            not FINISHED and name == "nested_checkpoint", reason="jax 0.10 does not nest them"
        ),
    )
    for name in MODES
    if "checkpoint" in name
}


@pytest.fixture(params=[False, True], ids=["remat2", "remat3"])
def remat3(request):
    before = jax.config.jax_remat3
    jax.config.update("jax_remat3", request.param)
    yield request.param
    jax.config.update("jax_remat3", before)


@pytest.fixture
def only_remat3():
    before = jax.config.jax_remat3
    jax.config.update("jax_remat3", True)
    yield
    jax.config.update("jax_remat3", before)


def gradient(group, problem, model):
    loss = loss_fn(smfree, group.token, problem, model, check_vma=FINISHED)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3)))


@pytest.mark.parametrize("mode", CHECKPOINTS.values())
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients(groups, only_remat3, structure, mode):
    mesh = ep_mesh(as_many(4))
    group, problem = groups(mesh, **CONFIG), make_problem(mesh)
    model = functools.partial(STRUCTURES[structure], wrap=MODES[mode])
    actual = gradient(group, problem, model)(*problem.arrays)
    assert_trees_close(actual, expected_gradients(structure))


SENDS = {"plain": 0, "checkpoint": 1, "checkpoint_save_comm": 0}
"""Dispatches that a layer repeats. A combine is at its end: nothing asks for its result again."""


@in_both_modes
@pytest.mark.parametrize("mode", SENDS)
def test_what_is_sent_again(groups, remat3, mode):
    """The policy keeps received rows; what runs again is a replay, and nothing is left over."""
    mesh = ep_mesh(as_many(4))
    group, problem = groups(mesh, **CONFIG), make_problem(mesh)
    model = functools.partial(STRUCTURES["loop"], wrap=MODES[mode])
    program = gradient(group, problem, model).lower(*problem.arrays).compile()
    assert not inspect.orphans(program)
    windows = inspect.overlap(program)
    replays = [w for w in windows if w.is_replay]
    assert len(replays) == 2 * SENDS[mode]
    assert all(w.operation == "dispatch" and not w.is_backward for w in replays)
    assert len(windows) == 2 * (2 + 2 + SENDS[mode])
    assert sum(w.is_backward for w in windows) == 2 * 2
    jax.block_until_ready(program(*problem.arrays))
    calls = group.stats()
    assert calls["dispatch_send_calls"] == group.num_ranks * 2 * (2 + SENDS[mode])
    assert calls["combine_recv_calls"] == group.num_ranks * 2 * 2


def test_a_gradient_that_needs_no_rows_again(groups, remat3):
    """Of the layer's last matmul alone: no half of an operation is left."""
    mesh = ep_mesh(as_many(4))
    group, problem = groups(mesh, **CONFIG), make_problem(mesh)

    @jax.checkpoint
    def layer(token, x, idx, weights, kernel):
        d, token = smfree.dispatch(token, x, idx, weights)
        out, token = smfree.combine(token, d, d.x)
        return token, out @ kernel

    def model(ops, *operands):
        return layer(*operands)

    loss = loss_fn(smfree, group.token, problem, model, check_vma=FINISHED)
    program = jax.jit(jax.grad(loss, 3)).lower(*problem.arrays).compile()
    assert not inspect.orphans(program)
    got = program(*problem.arrays)
    expected = jax.jit(
        jax.grad(lambda *arrays: loss_fn(smfree, group.token, problem, unwrapped)(*arrays), 3)
    )(*problem.arrays)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def unwrapped(ops, token, x, idx, weights, kernel):
    d, token = smfree.dispatch(token, x, idx, weights)
    out, token = smfree.combine(token, d, d.x)
    return token, out @ kernel


@pytest.mark.parametrize("policy", [None, smfree.save_comm_policy], ids=["all", "save_comm"])
def test_second_order_derivatives(groups, only_remat3, policy):
    mesh = ep_mesh(as_many(4))
    group, problem = groups(mesh, **CONFIG), make_problem(mesh)
    x, idx, weights, kernel = problem.arrays

    def derivative(wrap):
        def model(ops, *operands):
            return wrap(functools.partial(block, ops))(*operands)

        loss = loss_fn(smfree, group.token, problem, model, check_vma=FINISHED)
        grad = jax.grad(lambda x, w, k: loss(x, idx, w, k), argnums=(0, 1, 2))
        primals = (x, weights, kernel)
        return jax.jit(lambda *p: jax.jvp(grad, p, tuple(map(jnp.cos, p))))(*primals)

    actual = derivative(functools.partial(jax.checkpoint, policy=policy))
    assert_trees_close(actual, derivative(lambda layer: layer), tolerance=1e-4)
