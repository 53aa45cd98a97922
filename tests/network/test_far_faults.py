# SPDX-License-Identifier: Apache-2.0
"""Processes and links that fail between GPUs of two hosts: the named error everywhere, in time.

In time is the deadline and a second, with the group closed; nothing is left of any process, and
each ends with exit code 0.
"""

import random
import re
import signal
import time

import pytest

from network import cable, programs
from network.cable import Quality
from network.lab import told, wait_until_all_run

pytestmark = pytest.mark.cuda_only

TIMEOUT_S = 4.0
SHORT_S, LONG_S = 1.5, TIMEOUT_S + 3.0
MOMENTS = 20
FOREVER = 10**6
NAMED = re.compile(
    r"waited \d+\.\d s (?:inside its node )?for rank(?:\(s\))? (\d+)"
    r"|rank (\d+) \(in another process\) failed first"
    r"|rank\(s\) (\d+) \(process \d+\) (?:died|closed its group)"
)
PER_HOST = {"direct": 1, "device": 1, "hierarchical": 2}
# A rank waits so much longer for a relay, which waits for others itself.
PATIENCE_S = {"direct": 0.0, "device": 0.0, "hierarchical": min(TIMEOUT_S / 4, 1.0)}
# What CUDA's driver, NVSHMEM and UCX leave in /dev/shm when a process is killed.
OF_OTHERS = ("cuda.shm.", "mps_shm_", "sysmem_symm_heap", "nvshmem", "ucx_shm")

in_each_mode = pytest.mark.parametrize("mode", PER_HOST)


@pytest.fixture
def far(lab, mode):
    """Starts `programs.runs` in a mode."""
    if not lab.two_hosts and mode == "hierarchical":
        pytest.skip("nodes of two need two hosts: network namespaces need root")
    with lab.hosts() as hosts:

        def start(steps, *more):
            arguments = (mode, steps, TIMEOUT_S, *more)
            processes = lab.start(
                hosts, programs.runs, *arguments, per_host=PER_HOST[mode], heap="256M"
            )
            wait_until_all_run(processes)
            return hosts, processes

        yield start


def assert_nothing_left(hosts):
    left = {name for host in hosts for name in host.left_over()}
    assert {name for name in left if not name.startswith(OF_OTHERS)} == set()


def assert_named(process, mode, since, ranks, record_property):
    """It told the error of one of the ``ranks``, and has closed its group, in time."""
    ended = process.wait(LONG_S + 15)
    found = told(ended.text)
    assert ended.returncode == 0 and "closed_at" in found, ended.text
    for error in (found["error"], found["left_by"]):  # of the step, and not another one of `close`
        named = NAMED.search(error)
        assert named is not None, error
        assert int(next(filter(None, named.groups()))) in ranks, error
    seconds = found["closed_at"] - since
    record_property("seconds", f"{seconds:.2f}")
    assert seconds < TIMEOUT_S + PATIENCE_S[mode] + programs.GRACE_S, ended.text


def others_than(number, processes):
    return [p for p in range(len(processes)) if p != number]


@in_each_mode
@pytest.mark.parametrize("moment", range(MOMENTS), ids="moment{}".format)
def test_killed(far, lab, mode, moment, record_property):
    """At any moment of a step: survivors name it, or in hierarchical mode who misses it, too."""
    chance = random.Random(f"{mode} {moment}")
    # Not the first process, where JAX's coordinator lives: JAX aborts the others without it.
    lost = chance.randrange(1, 2 * PER_HOST[mode])
    hosts, processes = far(FOREVER, -1, lost, str(lab.directory))
    time.sleep(chance.uniform(0.0, 0.5))
    processes[lost].signal(signal.SIGKILL)
    since = time.monotonic()
    for number in others_than(lost, processes):
        ranks = {lost} if mode != "hierarchical" else set(others_than(number, processes))
        assert_named(processes[number], mode, since, ranks, record_property)
    assert processes[lost].wait(10).returncode == -signal.SIGKILL
    assert_nothing_left(hosts)


@pytest.mark.parametrize("moment", range(3), ids="moment{}".format)
def test_killed_between_its_counts_and_its_rows(lab, moment, record_property):
    """Counts arrive at once, and rows need most of a step over a cable this thin."""
    if reason := cable.missing():
        pytest.skip(reason)
    if not lab.two_hosts:
        pytest.skip("needs a cable, and so two hosts: network namespaces need root")
    chance = random.Random(moment)
    with lab.hosts(Quality(bytes_per_s=100e6 / 8)) as hosts:
        arguments = ("many rows", FOREVER, TIMEOUT_S, -1, 1, str(lab.directory))
        processes = lab.start(hosts, programs.runs, *arguments, heap="256M")
        wait_until_all_run(processes)
        time.sleep(chance.uniform(0.0, 1.0))
        processes[1].signal(signal.SIGKILL)
        assert_named(processes[0], "direct", time.monotonic(), {1}, record_property)
        assert_nothing_left(hosts)


@in_each_mode
def test_stopped_for_less_than_the_deadline(far, mode, record_property):
    hosts, processes = far(steps := 400)
    processes[-1].signal(signal.SIGSTOP)
    time.sleep(SHORT_S)
    processes[-1].signal(signal.SIGCONT)
    for process in processes:
        ended = process.wait(120)
        found = told(ended.text)
        assert ended.returncode == 0 and found["steps"] == steps, ended.text
    record_property("seconds", f"{found['seconds']:.2f}")
    assert_nothing_left(hosts)


@in_each_mode
def test_stopped_for_longer(far, mode, record_property):
    """The one that was stopped hears of the fault when it goes on."""
    hosts, processes = far(FOREVER)
    last = len(processes) - 1
    processes[last].signal(signal.SIGSTOP)
    since = time.monotonic()
    time.sleep(LONG_S)
    processes[last].signal(signal.SIGCONT)
    goes_on = time.monotonic()
    for number, process in enumerate(processes):
        ranks = {last} if mode != "hierarchical" else set(others_than(number, processes))
        if number == last:  # it may say what it has heard, too
            ranks, since = set(range(len(processes))), goes_on
        assert_named(process, mode, since, ranks, record_property)
    assert_nothing_left(hosts)


@in_each_mode
def test_leaves_in_order(far, mode, record_property):
    """It closes its group and ends, the others go on to the next step."""
    last = 2 * PER_HOST[mode] - 1
    hosts, processes = far(FOREVER, last)
    ended = None
    while ended is None:
        assert processes[last].popen.poll() is None, processes[last].log.read_text()
        ended = told(processes[last].log.read_text()).get("ended_at")
        time.sleep(0.02)
    for number in others_than(last, processes):
        ranks = {last} if mode != "hierarchical" else set(others_than(number, processes))
        assert_named(processes[number], mode, ended, ranks, record_property)
    assert processes[last].wait(60).returncode == 0
    assert_nothing_left(hosts)


@in_each_mode
def test_link_down_for_longer(far, lab, mode, record_property):
    """Each host names one of the other; the link is back when all have closed their groups."""
    if not lab.two_hosts:
        pytest.skip("needs a cable, and so two hosts: network namespaces need root")
    hosts, processes = far(FOREVER)
    hosts[1].set_cable("down")
    since = time.monotonic()
    time.sleep(LONG_S)
    hosts[1].set_cable("up")
    for number, process in enumerate(processes):
        assert_named(process, mode, since, set(others_than(number, processes)), record_property)
    assert_nothing_left(hosts)
