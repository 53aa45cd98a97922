# SPDX-License-Identifier: Apache-2.0
"""Compiles the programs once per session."""

import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

PROGRAMS = pathlib.Path(__file__).with_name("programs.py")
INSTALL = "pip install 'jax_smfree[schedule]'"


def has_cuda_plugin() -> bool:
    """Whether XLA can compile for NVIDIA GPUs here."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    names = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    return any(importlib.util.find_spec(name) for name in names)


@pytest.fixture(scope="session")
def schedule_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """``schedule_of(program, "on" or "off")``: the scheduled text of a program of programs.py."""
    if not has_cuda_plugin():
        missing = pytest.fail if "CI" in os.environ else pytest.skip
        missing(f"no CUDA plugin of JAX to compile for GPUs with: {INSTALL}")
    directory = tmp_path_factory.mktemp("schedules")
    # The tests' own flags are for CPUs. PYTHONPATH and the like must reach the child.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(PROGRAMS), str(directory)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        pytest.fail(
            f"{PROGRAMS.name} failed. (When ptxas or libdevice is missing: {INSTALL}.)\n"
            + done.stderr[-4000:]
        )
    return lambda program, latency_hiding: (
        directory / f"{program}.{latency_hiding}.hlo"
    ).read_text()
