# SPDX-License-Identifier: Apache-2.0
"""A combine refuses a handle that no dispatch has made, with the array's row and what it says."""

import re

import numpy as np
import pytest

from faults.handles import BAD, BAD_IN_NODES, ROW, spoiled_round_trip
from faults.running import assert_told, run, shards_of
from support import backend

CASES = [(name, None) for name in BAD] + [(name, 2) for name in BAD_IN_NODES]


@pytest.mark.parametrize(("name", "ranks_per_node"), CASES)
def test_broken_handle(faulty, name, ranks_per_node):
    bad = BAD_IN_NODES[name]
    group = faulty(at_least=2 * (ranks_per_node or 1), ranks_per_node=ranks_per_node)
    wrong = min(2, group.num_ranks - 1)
    outcome = run(group, spoiled_round_trip(bad, wrong))
    call = rf"rank {wrong} in {bad.phase} \(handles\.py:\d+ in local; lane 0"
    assert_told(group, f"{call}.*(?:{bad.words}).*Fix: ", (call, bad.words, "Fix: "))
    if backend() == "cpu":
        assert re.search(bad.words, outcome.errors[wrong])
    elif outcome.out is not None:
        assert np.isnan(shards_of(outcome.out)[wrong][ROW]).all()
