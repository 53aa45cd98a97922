# SPDX-License-Identifier: Apache-2.0
"""A rank that computes for long before it sends: the others wait for it, up to the deadline."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
from faults.running import CONFIG, assert_a_new_group_works, assert_fault, round_trip, run
from support import as_many, ep_mesh

pytestmark = pytest.mark.cuda_only

LATE = 1  # the rank


def matmuls(steps, x):
    """A number that takes ``steps`` matmuls to compute."""
    start = jnp.broadcast_to(x[0, 0], (2048, 2048))
    return jax.lax.fori_loop(0, steps, lambda _, m: jnp.tanh(m @ m), start)[0, 0]


@functools.cache
def steps_of_a_second():
    step, x = jax.jit(matmuls), jnp.ones((1, 1))
    step(1000, x).block_until_ready()  # compiles, and wakes the GPU up
    begin = time.monotonic()
    step(1000, x).block_until_ready()
    return 1000 / (time.monotonic() - begin)


def late_round_trip(seconds):
    """A round trip, before which one rank computes for about so long."""
    steps = round(seconds * steps_of_a_second())

    def local(token, x, *routing):
        work = matmuls(jnp.where(jax.lax.axis_index("ep") == LATE, steps, 0), x)
        return round_trip(token, x + 0 * work, *routing)

    return local


@pytest.fixture
def group_of(groups):
    return lambda **config: groups(ep_mesh(as_many(4, at_least=2)), **CONFIG, **config)


def test_before_the_deadline(group_of):
    group = group_of(timeout_s=30.0)
    expected = run(group, round_trip)
    late_one = late_round_trip(2.0)
    begin = time.monotonic()
    late = run(group, late_one)
    assert time.monotonic() - begin > 1.0
    assert expected.errors == late.errors == [None] * group.num_ranks
    np.testing.assert_array_equal(late.out, expected.out)


def test_after_the_deadline(group_of):
    group = group_of(timeout_s=1.0)
    outcome = run(group, late_round_trip(4.0))
    waits = (  # rank 0, 2 or 3
        r"rank [^1] .*in dispatch_recv \(running\.py:\d+ in round_trip; lane 0, forward, number 0\)"
        rf".* for rank {LATE}"
    )
    assert_fault(group, outcome, waits, [waits])
    assert_a_new_group_works()  # beside the one that failed, and after it
    with pytest.raises(smfree.SmfreeError, match=waits):
        group.check()
    group.close()
    assert_a_new_group_works()
