# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test, unless a launcher has decided otherwise."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()


@pytest.fixture
def groups():
    """Makes EP groups and closes them; raises what went wrong in any of them."""
    import jax_smfree as smfree

    made = []

    def create(mesh, axis="ep", **config):
        group = smfree.EpGroup.create(mesh, axis, config=smfree.EpConfig(**config))
        made.append(group)
        return group

    yield create
    for group in made:
        try:
            if not group.closed:
                group.check()
        finally:
            group.close()
