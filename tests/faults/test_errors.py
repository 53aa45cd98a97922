# SPDX-License-Identifier: Apache-2.0
"""What a program that fails raises, and where one catches it."""

import jax
import jax.numpy as jnp
import pytest

import jax_smfree as smfree
from faults.running import CONFIG, compiled, round_trip
from jax_smfree._src import row_checks
from support import as_many, backend, ep_mesh, make_problem


def bad_routing(token, x, topk_idx, topk_weights):
    """An expert that there is not."""
    d, token = smfree.dispatch(token, x, topk_idx.at[0, 0].set(99), topk_weights)
    return smfree.combine(token, d, d.x)[0]


def test_the_block_of_a_group_is_left_by_an_error_of_the_library():
    config = smfree.EpConfig(**CONFIG)
    with pytest.raises(smfree.SmfreeError, match="expert 99") as caught:
        with smfree.EpGroup.create(ep_mesh(as_many(2)), config=config) as group:
            problem = make_problem(group.mesh)
            step = compiled(group, bad_routing, problem)
            jax.block_until_ready(step(*problem.arrays[:3]))  # raises on CPUs
            group.check()
    assert group.closed
    if backend() == "cpu":
        assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
        assert not str(caught.value).startswith(("INVALID", "jax_smfree"))


@pytest.mark.cpu_only
def test_inside_of_the_block_it_is_an_error_of_jax():
    """On GPUs the result is NaN there."""
    config = smfree.EpConfig(**CONFIG)
    with smfree.EpGroup.create(ep_mesh(2), config=config) as group:
        problem = make_problem(group.mesh)
        step = compiled(group, bad_routing, problem)
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"jax_smfree: .*expert 99"):
            jax.block_until_ready(step(*problem.arrays[:3]))
        with pytest.raises(smfree.SmfreeError, match="expert 99"):
            group.check()


@pytest.mark.cpu_only
def test_an_error_that_jax_raises_in_a_call_it_has_made_before():
    """A process with one device runs the program inside of the call; JAX then has other types."""
    with pytest.raises(smfree.SmfreeError, match="expert 99"):
        with smfree.EpGroup.create(ep_mesh(1), config=smfree.EpConfig(**CONFIG)) as group:
            problem = make_problem(group.mesh)
            step = compiled(group, round_trip, problem)
            x, topk_idx, topk_weights = problem.arrays[:3]
            for _ in range(3):
                jax.block_until_ready(step(x, topk_idx, topk_weights))
            jax.block_until_ready(step(x, topk_idx.at[0, 0].set(99), topk_weights))


@pytest.mark.parametrize("error", [ValueError("jax_smfree: mine"), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)):
        with smfree.EpGroup.create(ep_mesh(1), config=smfree.EpConfig(**CONFIG)):
            raise error


def test_an_error_of_the_users_own_program_stays_what_it_is():
    def fails(x):
        raise RuntimeError("in a callback of the user")

    with pytest.raises(jax.errors.JaxRuntimeError, match="callback of the user"):
        with smfree.EpGroup.create(ep_mesh(1), config=smfree.EpConfig(**CONFIG)):
            jax.block_until_ready(
                jax.jit(lambda x: jax.pure_callback(fails, jax.typeof(x), x))(jnp.ones(2))
            )


@pytest.mark.cpu_only
def test_integers_that_no_check_has_stopped_are_not_summed(monkeypatch):
    """A program may be of another version of the library than the one that runs it."""
    monkeypatch.setattr(row_checks, "FLOATS", row_checks.DTYPES)

    def sum_of_integers(token, x, topk_idx, topk_weights):
        d, token = smfree.dispatch(token, x, topk_idx, topk_weights)
        return smfree.combine(token, d, d.x.astype(jnp.int32))[0]

    config = smfree.EpConfig(**CONFIG)
    with smfree.EpGroup.create(ep_mesh(as_many(2)), config=config) as group:
        problem = make_problem(group.mesh)
        step = compiled(group, sum_of_integers, problem)
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"rows of S32 in array 0, expected F"):
            jax.block_until_ready(step(*problem.arrays[:3]))
