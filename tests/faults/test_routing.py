# SPDX-License-Identifier: Apache-2.0
"""The send refuses routings that make no sense, on every rank, with rank, row and indices."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
from faults.running import CONFIG, assert_fault, round_trip, run
from support import as_many, backend, ep_mesh, make_problem, portable

BAD = {
    "twice": ((3, 3), r"row 4 names expert 3 twice: topk_idx = \[3, 3\]"),
    "too high": ((1, 8), r"row 4 names expert 8 of 8: topk_idx = \[1, 8\]"),
    "too low": ((-2, 1), r"row 4 names expert -2 of 8: topk_idx = \[-2, 1\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_routing(faulty, name):
    indices, match = BAD[name]
    group = faulty()
    wrong = min(2, group.num_ranks - 1)

    def local(token, x, topk_idx, topk_weights):
        bad = topk_idx.at[4].set(jnp.array(indices))
        topk_idx = jnp.where(jax.lax.axis_index("ep") == wrong, bad, topk_idx)
        return round_trip(token, x, topk_idx, topk_weights)

    outcome = run(group, local)
    call = rf"rank {wrong} in dispatch_send \(running\.py:\d+ in round_trip; lane 0.*\): "
    cause = f"{call}{match}.*Fix: "
    words = (f"rank {wrong}", "dispatch_send", r"running\.py:\d+ in round_trip", "lane 0")
    assert_fault(group, outcome, cause, words)
    again = run(group, round_trip)
    assert_fault(group, again, cause, words)  # it stays
    if backend() == "cpu":
        for rank in range(group.num_ranks):
            assert ("cannot go on" in outcome.errors[rank]) == (rank != wrong)
            assert re.search("the group failed earlier: .*" + cause, again.errors[rank])
    assert outcome.seconds < 5.0


@pytest.mark.parametrize("name", BAD)
def test_bad_routing_of_a_portable_group(name):
    """JAX's collectives know no error: the rank's results are NaN, and `check` says why."""
    indices, match = BAD[name]
    mesh = ep_mesh(as_many(4))
    wrong = min(2, mesh.size - 1)
    problem = make_problem(mesh, none_fraction=0.0)
    bad = problem.topk_idx.at[6 * wrong + 4].set(jnp.array(indices))
    with portable(), smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        outcome = run(group, round_trip, dataclasses.replace(problem, topk_idx=bad))
        call = rf"rank {wrong} in dispatch_send \(running\.py:\d+ in round_trip; lane 0\): "
        for _ in range(2):  # it stays
            with pytest.raises(smfree.SmfreeError, match=f"invalid routing: {call}{match}.*Fix: "):
                group.check()
    assert outcome.errors == [None] * mesh.size
    assert [np.isnan(r).all() for r in np.split(np.asarray(outcome.out), mesh.size)] == [
        rank == wrong for rank in range(mesh.size)
    ]
