# SPDX-License-Identifier: Apache-2.0
"""Two hosts without GPUs: their groups run over JAX's own collectives, by TCP.

The tests of several processes run here as under the launcher of a cluster; and one host goes away.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from network import programs
from network.hosts import launch
from network.lab import wait_until_all_run

pytestmark = pytest.mark.cpu_only

TESTS = Path(__file__).parent.parent
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
}
# What the others see of it: its connections end, or it falls silent.
LOSSES = {"ended": lambda host: host.end(), "cut off": lambda host: host.set_cable("down")}


def test_pytest_on_both(hosts, tmp_path):
    """An MoE layer, and round trips against the oracle, to the bit."""
    files = [f"{TESTS}/network/over_hosts.py", f"{TESTS}/multiprocess/test_round_trip.py"]
    which = "test_which_backend or test_moe_layer or R4-E8-K6-T6"
    # A group over both hosts warns that it is portable; elsewhere warnings are errors.
    options = ["-q", "-W", "ignore:EpGroup.create", "-p", "no:cacheprovider", "-k", which]
    command = [sys.executable, "-m", "pytest", *options, *files]
    for process in launch(hosts, command, tmp_path, ENVIRONMENT):
        ended = process.wait(240)
        assert ended.returncode == 0 and "3 passed" in ended.text, ended.text


def test_doctor(hosts, tmp_path):
    """``jax-smfree doctor --network`` sends rows from each host to the other one."""
    command = [sys.executable, "-W", "ignore:EpGroup.create", "-m", "jax_smfree", "doctor"]
    first, second = (
        process.wait(240)
        for process in launch(hosts, [*command, "--network", "--json"], tmp_path, ENVIRONMENT)
    )
    assert (first.returncode, second.returncode) == (0, 0), first.text + second.text
    diagnosis = json.loads(first.text[first.text.index("{") :])
    found = {finding["name"]: finding["value"] for finding in diagnosis["findings"]}
    assert found["processes"] == "2: 1 on hostA, 1 on hostB"
    assert found["group"] == "4 ranks, portable, hierarchical, nodes of 2"
    assert found["hostA (rank 0) ↔ hostB (rank 2)"].startswith("right; a row there and back in")
    assert "{" not in second.text


@pytest.mark.parametrize("how", LOSSES)
def test_a_host_goes_away(lab, how):
    """The survivor ends by an error of JAX's, which names the cause, and leaves nothing."""
    with lab.hosts() as hosts:
        processes = survivor, lost = lab.start(hosts, programs.runs, "portable", 10**6, 60.0)
        wait_until_all_run(processes)
        LOSSES[how](hosts[1])
        ended = survivor.wait(3 * programs.HEARTBEAT_S)
        assert ended.returncode not in (0, -9), ended.text
        assert re.search("Gloo all-to-all failed.*10.77.0.2|stopped sending heartbeats", ended.text)
        lost.wait(3 * programs.HEARTBEAT_S)
        assert hosts[0].left_over() == set()
