# SPDX-License-Identifier: Apache-2.0
"""`jax_smfree.testing.chaos` does what it says, and is over when it says so."""

import time

import numpy as np
import pytest

from faults.running import CONFIG, compiled, round_trip
from jax_smfree.testing import chaos
from support import ep_mesh, make_problem

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def timed(groups):
    """``(group, run)``; ``run()`` returns the seconds and the result of a compiled round trip."""
    group = groups(ep_mesh(4), **CONFIG)
    problem = make_problem(group.mesh)
    step = compiled(group, round_trip, problem)

    def run():
        start = time.monotonic()
        out = np.asarray(step(*problem.arrays[:3]))
        return time.monotonic() - start, out

    run()
    return group, run


def test_delays_end_with_the_block(timed):
    group, run = timed
    _, expected = run()
    with chaos(group, seed=3, max_delay_us=500_000):
        slow, out = run()
    np.testing.assert_array_equal(out, expected)
    # Of 2 x 16 messages the last is due after 0.1 s with a probability of all but 0.2**32.
    assert slow > 0.1
    assert min(run()[0] for _ in range(5)) < slow / 2


def test_stalls(timed):
    group, run = timed
    with chaos(group, stall_probability=1.0, stall_ms=200):
        seconds, _ = run()
    assert seconds >= 0.4  # one for each of the two operations


def test_an_exception_ends_it(timed):
    group, run = timed
    with pytest.raises(KeyError), chaos(group, stall_probability=1.0, stall_ms=60_000):
        raise KeyError
    assert run()[0] < 5.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_delay_us": -1},
        {"max_delay_us": 0.5},
        {"stall_ms": 2**40},
        {"stall_probability": 1.5},
        {"stall_probability": "often"},
        {"seed": -1},
    ],
)
def test_arguments(timed, wrong):
    group, _ = timed
    with pytest.raises(ValueError, match=next(iter(wrong))), chaos(group, **wrong):
        pass
    with pytest.raises(TypeError, match="expected an EpGroup"), chaos("group"):
        pass


def test_closed_group(timed):
    group, _ = timed
    group.close()
    with pytest.raises(ValueError, match="closed"), chaos(group):
        pass
