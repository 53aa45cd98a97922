# SPDX-License-Identifier: Apache-2.0
"""The hosts and cables of these tests do what they are said to do."""

import os
import signal
import subprocess
import sys
import time

import pytest

from network import cable
from network.cable import Quality
from network.hosts import two_hosts

SERVER = """
import socket, sys
with socket.create_server(("10.77.0.1", 5000)) as server:
    print("listens", flush=True)
    connection, _ = server.accept()
with connection:
    connection.sendall(b"!")
    while piece := connection.recv(2**20):
        pass
"""
CLIENT = """
import socket, sys, time
begin = time.monotonic()
with socket.create_connection(("10.77.0.1", 5000)) as connection:
    connection.recv(1)
    print("answer", time.monotonic() - begin, flush=True)
    connection.sendall(bytes(int(sys.argv[1])))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print("sent", time.monotonic() - begin, flush=True)
"""


def wait_for(condition, what):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def sleep_in(host, directory, seconds):
    process = host.start(["bash", "-c", f"echo up; exec sleep {seconds}"], os.environ, directory)
    wait_for(lambda: process.log.read_text() == "up\n", "it starts")
    return process


def test_signals_reach_the_process(hosts, tmp_path):
    killed = sleep_in(hosts[0], tmp_path / "killed", 100)
    killed.signal(signal.SIGKILL)
    assert killed.wait(10).returncode == -signal.SIGKILL
    stopped = sleep_in(hosts[1], tmp_path / "stopped", 0.5)
    stopped.signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        stopped.popen.wait(1.0)
    stopped.signal(signal.SIGCONT)
    assert stopped.wait(10).returncode == 0


def test_a_process_that_hangs_says_where(hosts, tmp_path):
    sleeps = "import time; print('up', flush=True); time.sleep(100)"
    command = [sys.executable, "-X", "faulthandler", "-c", sleeps]
    process = hosts[0].start(command, os.environ, tmp_path / "sleeps")
    wait_for(lambda: process.log.read_text() == "up\n", "it starts")
    with pytest.raises(AssertionError, match=r"(?s)still runs after 0\.1 s.*Current thread"):
        process.wait(0.1)


def test_what_is_left_over_is_seen(hosts, tmp_path):
    assert hosts[0].left_over() == set()
    process = sleep_in(hosts[0], tmp_path / "runs", 100)
    hosts[0].run("touch", "/dev/shm/file")
    assert {"file"} < hosts[0].left_over() and hosts[1].left_over() == set()
    process.signal(signal.SIGKILL)
    process.wait(10)
    assert hosts[0].left_over() == {"file"}


def seconds_over(quality, directory, count, patience_s=30.0):
    """Until one connection is there and answers, and until it has carried ``count`` bytes more."""
    with two_hosts(directory, quality=quality) as (a, b):
        server = a.start([sys.executable, "-c", SERVER], os.environ, directory / "server")
        wait_for(lambda: "listens" in server.log.read_text(), "the server")
        client = [sys.executable, "-c", CLIENT, str(count)]
        ended = b.start(client, os.environ, directory / "client").wait(patience_s)
        answer, sent = (float(line.split()[1]) for line in ended.text.splitlines())
        return answer, sent


@pytest.mark.usefixtures("hosts")  # for the reason why there are none
def test_a_cable_has_its_quality(tmp_path):
    if reason := cable.missing():
        pytest.skip(reason)
    answer, _ = seconds_over(Quality(delay_s=0.02), tmp_path, 1)
    assert answer > 3 * 0.02  # there, back, and there
    _, sent = seconds_over(Quality(bytes_per_s=1e6), tmp_path, 500_000)
    assert 0.4 < sent < 5.0
    with pytest.raises(AssertionError, match="still runs"):
        seconds_over(Quality(loss=1.0), tmp_path, 1, patience_s=1.0)
