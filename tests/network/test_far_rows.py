# SPDX-License-Identifier: Apache-2.0
"""Rows between GPUs that reach one another over TCP alone: the tests of several processes there.

Each test is a pytest in every process of two hosts, as under the launcher of a cluster.
"""

import os
import re

import numpy as np
import pytest

from network import programs

pytestmark = pytest.mark.cuda_only

ROUND_TRIPS = "multiprocess/test_round_trip.py"
GRAPHS = {
    "without": "--xla_gpu_enable_command_buffer=",
    "with": "--xla_gpu_graph_min_graph_size=1",
}


@pytest.fixture
def run(lab, record_property):
    """Runs the tests ``which`` of a file in ``per_host`` processes on each host."""

    def on_hosts(file, which, per_host=1, heap="2G"):
        with lab.hosts() as hosts:
            first, *_ = lab.run_tests(hosts, file, which, per_host, heap)
        record_property("passed", re.search(r"(\d+) passed", first.text)[1])

    return on_hosts


@pytest.fixture
def _needs_two_hosts(lab):
    """On one host the lab has far peers only: groups with near ones cannot be made."""
    if not lab.two_hosts:
        pytest.skip("has near peers, and so needs two hosts: network namespaces need root")


on_two_hosts = pytest.mark.usefixtures("_needs_two_hosts")
by_one_and_two = pytest.mark.parametrize("per_host", [1, 2])


@by_one_and_two
def test_round_trips(lab, run, per_host):
    """All dtypes and shapes, capacities, all gradients; direct and hierarchical; who puts."""
    if not lab.two_hosts and per_host == 2:
        pytest.skip("nodes of two need two hosts: network namespaces need root")
    which = "not chunks and not many_rows"
    run(ROUND_TRIPS, which if lab.two_hosts else f"nodes1 and {which}", per_host)


@pytest.mark.parametrize("which", ["nodes1 and not puts", "nodes1-puts"])
def test_messages_in_chunks(run, which):
    run(ROUND_TRIPS, f"test_messages_in_chunks and {which}", heap="4G")


@on_two_hosts
def test_messages_in_chunks_of_nodes(run):
    run(ROUND_TRIPS, "test_messages_in_chunks and nodes2", per_host=2, heap="12G")


@on_two_hosts
def test_relays_of_many_rows(run):
    run(ROUND_TRIPS, "test_relays_of_many_rows", per_host=2)


@on_two_hosts
@by_one_and_two
def test_moe_layers(run, per_host):
    """With kernels that are loaded while puts and relays wait."""
    run("multiprocess/test_moe_layer.py", "test_gradients", per_host)


@on_two_hosts
def test_further_axes(run):
    """Two groups in one world."""
    run("multiprocess/test_further_axes.py", "test_each_coordinate_is_a_group", per_host=2)


@on_two_hosts
@by_one_and_two
def test_rows_of_any_kind(run, per_host):
    run("multiprocess/test_leaves.py", "test_leaves", per_host)


def test_cuda_graphs(lab, tmp_path):
    """XLA records and replays the puts of the GPU: a training is the same to the bit."""
    losses = {}
    for name, flag in GRAPHS.items():
        result = tmp_path / f"{name}.npy"
        with lab.hosts() as hosts:
            env = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}
            for process in lab.start(hosts, programs.trains, "device", str(result), env=env):
                ended = process.wait(120)
                assert ended.returncode == 0, ended.text
        losses[name] = np.load(result)
    assert losses["with"][-1] < losses["with"][0] / 2
    np.testing.assert_array_equal(losses["with"], losses["without"])
