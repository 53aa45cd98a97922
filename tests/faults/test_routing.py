# SPDX-License-Identifier: Apache-2.0
"""The send refuses routings that make no sense, on every rank, with rank, row and indices."""

import re

import jax
import jax.numpy as jnp
import pytest

import jax_smfree as smfree
from faults.running import RANKS, round_trip, run

BAD = {
    "twice": ((3, 3), r"row 4 names expert 3 twice: topk_idx = \[3, 3\]"),
    "too high": ((1, 8), r"row 4 names expert 8 of 8: topk_idx = \[1, 8\]"),
    "too low": ((-2, 1), r"row 4 names expert -2 of 8: topk_idx = \[-2, 1\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_routing(faulty, name):
    indices, match = BAD[name]
    group = faulty()

    def local(token, x, topk_idx, topk_weights):
        bad = topk_idx.at[4].set(jnp.array(indices))
        topk_idx = jnp.where(jax.lax.axis_index("ep") == 2, bad, topk_idx)
        return round_trip(token, x, topk_idx, topk_weights)

    outcome = run(group, local)
    cause = rf"rank 2 in dispatch_send \(running\.py:\d+ in round_trip; lane 0.*\): {match}.*Cure: "
    for rank in range(RANKS):
        assert re.search(cause, outcome.errors[rank])
        assert ("cannot go on" in outcome.errors[rank]) == (rank != 2)
    assert outcome.seconds < 5.0

    for _ in range(2):  # it stays
        with pytest.raises(smfree.SmfreeError, match=cause):
            group.check()
    for error in run(group, round_trip).errors:
        assert re.search("the group has failed before: " + cause, error)
