# SPDX-License-Identifier: Apache-2.0
"""Waiting ends at the deadline, on every rank, in an error that names who waits for whom."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
from faults.running import (
    CONFIG,
    assert_fault,
    assert_works,
    compiled,
    error_of,
    round_trip,
    run,
)
from jax_smfree.testing import chaos
from support import as_many, backend, ep_mesh, make_problem


def silent_rank(group):
    """The one that does not do what the others do."""
    return min(2, group.num_ranks - 1)


def others(group):
    return set(range(group.num_ranks)) - {silent_rank(group)}


IN_NODES = pytest.param({"ranks_per_node": 2}, id="hierarchical", marks=pytest.mark.cpu_only)


@pytest.mark.parametrize("nodes", [pytest.param({}, id="direct"), IN_NODES])
def test_a_rank_that_never_sends(faulty, nodes):
    group = faulty(timeout_s=2.0, at_least=2, **nodes)
    silent = silent_rank(group)

    def local(token, *arrays):
        def idle(token, x, *_):
            return jnp.zeros_like(x)

        return jax.lax.cond(jax.lax.axis_index("ep") == silent, idle, round_trip, token, *arrays)

    outcome = run(group, local)
    waits = (
        r"rank [013] in dispatch_recv \(running\.py:\d+ in round_trip; lane 0, "
        rf"forward, number 0\): waited 2\.\d s for rank {silent}: nothing arrived; rank {silent} "
        r"never sent anything.*Fix: "
    )
    words = (
        r"rank [013]", "dispatch_recv", r"running\.py:\d+ in round_trip", "lane 0", "number 0",
        rf"rank {silent}",
    )  # fmt: skip
    assert_fault(group, outcome, waits, words, others(group))
    if backend() == "cpu":
        for rank in others(group):
            assert f"rank {rank} " in outcome.errors[rank]  # its own phase, too
    assert 2.0 <= outcome.seconds < 4.0


@pytest.mark.parametrize("nodes", [pytest.param({}, id="direct"), IN_NODES])
def test_a_rank_that_stops_in_the_middle(faulty, nodes):
    """The error says what the last thing was that came from it.

    In hierarchical mode its relay misses it, on behalf of all others.
    """
    group = faulty(timeout_s=2.0, at_least=2, **nodes)
    silent = silent_rank(group)

    def local(token, *arrays):
        d, token = smfree.dispatch(token, *arrays)

        def stop(token):
            return jnp.zeros_like(arrays[0])

        def go_on(token):
            return smfree.combine(token, d, d.x)[0]

        return jax.lax.cond(jax.lax.axis_index("ep") == silent, stop, go_on, token)

    outcome = run(group, local)
    phase, where = ("combine_send", "inside its node ") if nodes else ("combine_recv", "")
    waits = (
        rf"in {phase} .* number 1\): waited 2\.\d s {where}for rank {silent}: nothing arrived; "
        rf"last from rank {silent}: dispatch number 0"
    )
    words = (phase, "lane 0", "number 1", rf"rank {silent}")
    assert_fault(group, outcome, waits, words, others(group))
    assert outcome.seconds < 4.0


@pytest.mark.cpu_only
def test_a_mover_that_stands_still(faulty):
    group = faulty(timeout_s=2.0)
    with chaos(group, stall_probability=1.0, stall_ms=60_000):
        outcome = run(group, round_trip)
    for error in outcome.errors:
        assert re.search(r"in dispatch_recv .*: waited 2\.\d s", error)
    assert outcome.seconds < 4.0
    start = time.monotonic()
    group.close()
    assert time.monotonic() - start < 10.0


def test_a_slow_rank_is_no_fault(groups):
    """The others wait for it."""
    group = groups(ep_mesh(as_many(4)), **CONFIG, timeout_s=30.0)

    def local(token, x, *routing):
        steps = jnp.where(jax.lax.axis_index("ep") == silent_rank(group), 10_000, 0)
        work = jax.lax.fori_loop(0, steps, lambda _, m: jnp.sin(m), jnp.tile(x, (20, 8)))
        return round_trip(token, x + 0 * work[0, 0], *routing)

    outcome = run(group, local)
    assert outcome.errors == [None] * group.num_ranks
    assert outcome.seconds < 20.0
    assert outcome.seconds > 0.05
    # A loop of so many launches is late on the host too, and a GPU's recv is launched after it.
    if others(group) and backend() == "cpu":
        assert group.stats()["dispatch_recv_wait_ns"] > 0.05e9
    assert_works(group)


def test_a_deadline_starts_with_the_wait(groups):
    """An old group is as patient as a new one."""
    group = groups(ep_mesh(as_many(4)), **CONFIG, timeout_s=1.0)
    problem = make_problem(group.mesh)
    step = compiled(group, round_trip, problem)
    expected = np.asarray(step(*problem.arrays[:3]))
    time.sleep(1.5)
    out = step(*problem.arrays[:3])
    assert error_of(out) is None
    np.testing.assert_array_equal(out, expected)
