# SPDX-License-Identifier: Apache-2.0
"""Processes that hide their GPUs from one another are told what that costs."""

import os
import warnings

import pytest

from jax_smfree.testing import initialize, launch
from jax_smfree.testing.environment import visible_gpus

pytestmark = pytest.mark.cuda_only


def create_a_group(hide):
    """For two processes with a GPU each: its warnings are errors."""
    if hide:
        mine = visible_gpus()[int(os.environ["JAX_LOCAL_DEVICE_IDS"])]
        os.environ |= {"CUDA_VISIBLE_DEVICES": mine, "JAX_LOCAL_DEVICE_IDS": "0"}
    initialize()
    import jax_smfree as smfree
    from faults.running import CONFIG
    from support import ep_mesh

    warnings.simplefilter("error")
    with smfree.EpGroup.create(ep_mesh(2), config=smfree.EpConfig(**CONFIG)):
        print("created")


def launched(hide):
    if len(set(visible_gpus())) < 2:
        pytest.skip("needs 2 GPUs")
    tests = os.path.dirname(os.path.dirname(__file__))
    return launch(
        create_a_group, args=[hide], processes=2, devices_per_process=1, platform="cuda",
        env={"PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip


def test_all_gpus_are_seen():
    for process in launched(hide=False).check().processes:
        assert "created" in process.text


def test_hidden_gpus():
    texts = [process.text for process in launched(hide=True).processes]
    assert any("hides them from process" in text for text in texts), texts
