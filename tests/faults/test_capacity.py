# SPDX-License-Identifier: Apache-2.0
"""More rows than ``recv_capacity``: an error that is told once, or a count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
import oracle
from faults.running import CONFIG, assert_told, run
from support import ep_mesh, make_problem

RANKS = 4
CAPACITY = 15
ROWS = 6


def dispatch_and_combine(token, *arrays):
    d, token = smfree.dispatch(token, *arrays)
    out, _ = smfree.combine(token, d, jnp.ones_like(d.x))
    return jax.tree.map(lambda a: a[None], (d.x, d.weights, d.num_dropped[0], out))


def problem_with_overflow_on(rank):
    """Every row goes to the first expert of ``rank``, and of the one after it."""
    problem = make_problem(ep_mesh(RANKS), tokens=ROWS)
    to = np.array([2 * rank, 2 * (rank + 1) % 8], np.int32)
    idx = np.broadcast_to(to, problem.topk_idx.shape).copy()
    idx[: 2 * ROWS, 1] = -1  # half of them to the second one: they fit
    return type(problem)(problem.mesh, problem.x, jnp.asarray(idx), *problem.arrays[2:])


def test_error(groups):
    """NaN on that rank and in what depends on it, exact rows elsewhere; then all is well again."""
    group = groups(ep_mesh(RANKS), **CONFIG, recv_capacity=CAPACITY)
    outcome = run(group, dispatch_and_combine, problem_with_overflow_on(rank=1))
    assert outcome.errors == [None] * RANKS  # the program runs to its end
    x, weights, num_dropped, out = map(np.asarray, outcome.out)
    np.testing.assert_array_equal(num_dropped, [0, RANKS * ROWS - CAPACITY, 0, 0])
    assert np.isnan(x[1]).all() and np.isnan(weights[1]).all()
    others = [0, 2, 3]
    assert np.isfinite(x[others]).all() and np.isfinite(weights[others]).all()
    kept = np.arange(RANKS * ROWS).reshape(RANKS, ROWS) < CAPACITY
    assert np.isnan(out[kept]).all()  # their copy on rank 1 was kept, and poisoned

    message = (
        r"rank 1 in dispatch_recv \(test_capacity\.py:\d+ in dispatch_and_combine.*"
        rf"{RANKS * ROWS - CAPACITY} rows exceed recv_capacity {CAPACITY}.*Cure: "
    )
    words = ("rank 1", "dispatch_recv", r"test_capacity\.py:\d+", "recv_capacity", str(CAPACITY))
    assert_told(group, message, words)
    group.check()

    fits = run(
        group, dispatch_and_combine, make_problem(group.mesh, tokens=ROWS, none_fraction=0.5)
    )
    assert np.isfinite(jax.tree.leaves(fits.out)[0]).all()
    assert not np.any(fits.out[2])
    group.check()
    assert group.stats()["rows_dropped"] == RANKS * ROWS - CAPACITY


def test_error_on_two_ranks_is_one_error(groups):
    """The first one is told; the next overflow is told again."""
    group = groups(ep_mesh(RANKS), **CONFIG, recv_capacity=ROWS)
    for _ in range(2):
        outcome = run(group, dispatch_and_combine, problem_with_overflow_on(rank=1))
        assert np.sum(np.asarray(outcome.out[2]) > 0) == 2
        with pytest.raises(smfree.SmfreeError, match=r"rank [12] in dispatch_recv"):
            group.check()
        group.check()


def test_drop(groups):
    """The last rows go first, are counted, and nothing is said."""
    group = groups(ep_mesh(RANKS), **CONFIG, recv_capacity=CAPACITY, overflow="drop")
    problem = problem_with_overflow_on(rank=1)
    for calls in range(1, 3):
        outcome = run(group, dispatch_and_combine, problem)
        assert outcome.errors == [None] * RANKS
        group.check()
        assert group.stats()["rows_dropped"] == calls * (RANKS * ROWS - CAPACITY)
    x, weights, num_dropped, out = map(np.asarray, outcome.out)
    sent, idx, topk_weights = (np.asarray(a).reshape(RANKS, ROWS, -1) for a in problem.arrays[:3])
    routing = oracle.route(idx, 8, recv_capacity=CAPACITY)
    rows, row_weights = oracle.dispatch(routing, sent, topk_weights)
    np.testing.assert_array_equal(x, rows)
    np.testing.assert_array_equal(weights, row_weights)
    np.testing.assert_array_equal(num_dropped, routing.num_dropped)
    expected = oracle.combine(routing, np.ones_like(x), weights)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
