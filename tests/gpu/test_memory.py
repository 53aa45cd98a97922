# SPDX-License-Identifier: Apache-2.0
"""What a group takes of a GPU's memory: as much as it says, all of it given back."""

import jax.numpy as jnp
import pytest

import jax_smfree as smfree
from gpu.driver import free_bytes
from support import as_many, ep_mesh

pytestmark = pytest.mark.cuda_only

PAGE = 2 << 20
SIZES = {"num_experts": 8, "top_k": 2, "hidden": 4096, "max_tokens": 4096, "num_lanes": 4}


@pytest.mark.parametrize("config", [{}, {"differentiable": False}, {"dtype": jnp.float32}])
def test_report(groups, config):
    """The buffers that other ranks reach are those of the size hint, in whole pages."""
    group = groups(ep_mesh(as_many(4)), **SIZES, **config)
    report = group.memory_report()
    hint = smfree.nvl_size_hint(group.config, group.num_ranks)
    assert report["device_bytes"] == group.num_ranks * -(-hint // PAGE) * PAGE
    assert 0 < report["scratch_bytes"] < report["device_bytes"] / 10
    assert 0 < report["pinned_bytes"] < report["device_bytes"] / 10


def test_memory_comes_back():
    mesh = ep_mesh(as_many(4))
    config = smfree.EpConfig(**SIZES)
    smfree.EpGroup.create(mesh, config=config).close()  # kernels are loaded once
    before = free_bytes(0)
    for _ in range(3):
        with smfree.EpGroup.create(mesh, config=config):
            assert free_bytes(0) < before
    hint = smfree.nvl_size_hint(config, mesh.size)
    assert free_bytes(0) > before - hint // 2


def test_too_large(groups):
    """The error says what to lower, and what else wants memory."""
    with pytest.raises((smfree.SmfreeError, ValueError)) as refused:
        groups(ep_mesh(as_many(4)), **SIZES | {"hidden": 1 << 22})
    for word in ("max_tokens", "num_lanes", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        assert word in str(refused.value)
