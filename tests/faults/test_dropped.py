# SPDX-License-Identifier: Apache-2.0
"""A group that is dropped without close() is closed, and not before its time."""

import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from faults.running import CONFIG, assert_works, compiled, round_trip
from jax_smfree._src import life
from support import as_many, ep_mesh, make_problem

DROPPED = pytest.warns(ResourceWarning, match=r"EpGroup\(axis='ep'.* was dropped without close")


def create():
    return smfree.EpGroup.create(ep_mesh(as_many(4)), config=smfree.EpConfig(**CONFIG))


def jitted(group, local):
    """``local(token, x, topk_idx, topk_weights)`` on every rank; jit's caches hold it."""

    def with_token(*arrays):
        return local(group.token(), *arrays)

    return jax.jit(jax.shard_map(with_token, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep")))


def forward(group, problem):
    return jitted(group, round_trip)(*problem.arrays[:3])


def gradient(group, problem):
    x, *routing = problem.arrays[:3]
    step = jitted(group, jax.checkpoint(round_trip))
    return jax.jit(jax.grad(lambda x: jnp.sum(step(x, *routing))))(x)


def compiled_ahead(group, problem):
    return compiled(group, round_trip, problem)(*problem.arrays[:3])


def token_as_argument(group, problem):
    """The token is part of the structure that jit's caches know the function by."""
    specs = (group.token_spec, *[P("ep")] * 3)
    step = jax.jit(jax.shard_map(round_trip, mesh=group.mesh, in_specs=specs, out_specs=P("ep")))
    return step(group.token(), *problem.arrays[:3])


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("use", [forward, gradient, compiled_ahead, token_as_argument])
def test_nothing_of_jax_holds_a_group(use):
    def use_and_drop():
        group = create()
        jax.block_until_ready(use(group, make_problem(group.mesh)))
        return group._life

    with DROPPED:
        dropped = use_and_drop()
        gc.collect()
    wait_until(lambda: not dropped.natives)
    wait_until(lambda: dropped not in life._living)


def test_a_program_under_way_ends_first():
    def launch_and_drop():
        group = create()
        heavy = jnp.eye(300)

        def busy(token, x, *arrays):
            waste = jax.lax.fori_loop(0, 100, lambda _, a: jnp.tanh(a @ heavy), heavy)
            return round_trip(token, x + 0 * waste[0, 0], *arrays)

        problem = make_problem(group.mesh)
        expected = compiled(group, round_trip, problem)(*problem.arrays[:3])
        step = compiled(group, busy, problem)
        return expected, [step(*problem.arrays[:3]) for _ in range(5)]

    with DROPPED:
        expected, results = launch_and_drop()
        gc.collect()
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_a_token_holds_its_group():
    def only_its_token():
        return create().token()

    token = only_its_token()
    gc.collect()
    token = jax.jit(lambda token: token)(token)
    assert_works(token.group)
    token.group.close()


def test_a_closed_group_is_dropped_in_silence():
    group = create()
    group.close()
    del group
    gc.collect()  # a warning is an error here
