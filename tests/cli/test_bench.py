# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import pytest

from jax_smfree.bench.cases import COMPUTE, LIBRARY, PEERS, PHASES, TOGETHER

pytestmark = pytest.mark.cpu_only

QUICK = ("bench", "--shape", "64x128:2of8", "--budget", "0.01")


def test_table_json_and_picture(run, tmp_path):
    output, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    text = run(*QUICK, "--ranks", 2, "--output", output, "--plot", plot).stdout
    times = json.loads(output.read_text())["times_us"]
    assert {LIBRARY, COMPUTE, TOGETHER, *PHASES, *PEERS} <= times.keys()
    for name in (LIBRARY, COMPUTE, TOGETHER, *PHASES, *PEERS):
        assert name in text
        assert 0 < times[name]["p10"] <= times[name]["median"] <= times[name]["p90"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, text.splitlines())) <= 80


def test_too_many_ranks(run):
    assert "got --ranks 512, expected at most" in run(*QUICK, "--ranks", 512, exit_code=2).output


def test_experts_that_do_not_divide(run):
    assert (
        "experts a multiple of the ranks"
        in run("bench", "--shape", "64x128:2of9", "--ranks", 2, exit_code=2).output
    )


def test_it_makes_the_devices_that_it_needs(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    options = ("--shape", "64x128:2of9", "--budget", "0.01", "--ranks", "3", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "jax_smfree", "bench", *options],
        cwd=tmp_path,  # a clone's own folder has a jax_smfree without its native module
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout)["ranks"] == 3
