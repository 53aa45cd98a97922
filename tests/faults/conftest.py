# SPDX-License-Identifier: Apache-2.0
"""Every fault leaves the process usable."""

import pytest


@pytest.fixture
def faulty():
    """Makes a group that is going to fail, and proves afterwards that another one still works."""
    import jax_smfree as smfree  # and JAX: not before tests/conftest.py has configured it
    from faults.running import CONFIG, assert_a_new_group_works
    from support import as_many, ep_mesh

    made = []

    def create(at_least=1, **config):
        """Of four ranks, or of as many GPUs as there are, ``at_least`` so many."""
        group = smfree.EpGroup.create(
            ep_mesh(as_many(4, at_least)),
            config=smfree.EpConfig(**(CONFIG | {"timeout_s": 30.0} | config)),
        )
        made.append(group)
        return group

    yield create
    assert_a_new_group_works()  # beside the one that failed, and after it
    for group in made:
        group.close()
    assert_a_new_group_works()
