# SPDX-License-Identifier: Apache-2.0
"""examples/life_of_a_token.py checks its own run, and draws it."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_only

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "life_of_a_token.py"


def test_it_draws(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", "life.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "visits experts" in done.stdout
    assert (tmp_path / "life.png").read_bytes().startswith(b"\x89PNG")
