# SPDX-License-Identifier: Apache-2.0
"""Every fault leaves the process usable."""

import pytest

import jax_smfree as smfree
from faults.running import CONFIG, RANKS, assert_a_new_group_works
from support import ep_mesh


@pytest.fixture
def faulty():
    """Makes a group that is going to fail, and proves afterwards that another one still works."""
    made = []

    def create(**config):
        group = smfree.EpGroup.create(
            ep_mesh(RANKS), config=smfree.EpConfig(**(CONFIG | {"timeout_s": 30.0} | config))
        )
        made.append(group)
        return group

    yield create
    assert_a_new_group_works()  # beside the one that failed, and after it
    for group in made:
        group.close()
    assert_a_new_group_works()
