# SPDX-License-Identifier: Apache-2.0
"""Cables that are slow, thin, lose packets or are out for a moment: right results, and no fault.

Over such a network a step takes longer, never as long as the deadline. And what goes over a cable.
"""

import re
import time

import pytest

from network import cable, programs
from network.cable import Quality
from network.lab import told, wait_until_all_run

QUALITIES = {
    "20 ms": Quality(delay_s=0.02),
    "1 % lost": Quality(loss=0.01),
    "100 Mbit/s": Quality(bytes_per_s=100e6 / 8),
}
STEPS = 20
TIMEOUT_S = 20.0
DOWN_S = 1.0

in_each_mode = pytest.mark.parametrize(
    ("mode", "per_host"),
    [
        pytest.param("portable", 1, marks=pytest.mark.cpu_only),
        *(
            pytest.param(mode, per_host, marks=pytest.mark.cuda_only)
            for mode, per_host in (("direct", 1), ("device", 1), ("hierarchical", 2))
        ),
    ],
)


@pytest.fixture(autouse=True)
def _needs_a_cable(lab):
    if not lab.two_hosts:
        pytest.skip("needs a cable, and so two hosts: network namespaces need root")


def assert_all_right(processes, steps, record_property):
    for process in processes:
        ended = process.wait(120)
        found = told(ended.text)
        assert ended.returncode == 0 and "error" not in found, ended.text
        assert found["steps"] == steps
    record_property("seconds", f"{found['seconds']:.2f}")


@in_each_mode
@pytest.mark.parametrize("quality", QUALITIES)
def test_right_results(lab, mode, per_host, quality, record_property):
    if reason := cable.missing():
        pytest.skip(reason)
    with lab.hosts(QUALITIES[quality]) as hosts:
        processes = lab.start(hosts, programs.runs, mode, STEPS, TIMEOUT_S, per_host=per_host)
        assert_all_right(processes, STEPS, record_property)


@in_each_mode
def test_down_for_a_moment(lab, mode, per_host, record_property):
    """TCP sends again what was lost meanwhile."""
    steps = 400
    with lab.hosts() as hosts:
        processes = lab.start(hosts, programs.runs, mode, steps, TIMEOUT_S, per_host=per_host)
        wait_until_all_run(processes)
        hosts[1].set_cable("down")
        time.sleep(DOWN_S)
        assert all("steps" not in told(process.log.read_text()) for process in processes)
        hosts[1].set_cable("up")
        assert_all_right(processes, steps, record_property)


@in_each_mode
def test_bytes_on_the_wire(lab, mode, per_host, record_property):
    """The times are a check of the lab itself: rows pass no faster than the link lets them."""
    with lab.hosts() as hosts:
        first, *_ = lab.run_tests(hosts, "network/over_cable.py", mode, per_host)
    (wire,) = re.findall(r"^WIRE (.*)$", first.text, re.MULTILINE)
    record_property("wire", wire)
