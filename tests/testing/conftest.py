# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``jax_smfree.testing`` share: they run pytest and programs as users do."""

import contextlib
import importlib.metadata
import os
import textwrap
import time
from pathlib import Path

import pytest

import jax_smfree

# Put in front of the test files that are run in a pytest of their own.
SAMPLE = """
import os, signal, subprocess, sys, time
import jax, numpy as np, pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

def total():
    '''0 + 1 + ... over all devices of all processes, by a collective.'''
    n = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    here = NamedSharding(mesh, P("ep"))
    x = jax.make_array_from_callback((n,), here, lambda i: np.arange(n, dtype=np.float32)[i])
    add = jax.shard_map(
        lambda v: jax.lax.psum(v, "ep"), mesh=mesh, in_specs=P("ep"), out_specs=P()
    )
    return float(jax.jit(add)(x).addressable_data(0)[0])

multihost = pytest.mark.multihost
"""


@pytest.fixture
def sample():
    """Python source that continues ``SAMPLE``."""
    return lambda source: SAMPLE + textwrap.dedent(source)


@pytest.fixture(scope="session")
def plugin_args():
    """Arguments for pytest: the plugin, where it is not installed, and not one that is slow."""
    args = ["-p", "no:hypothesispytest"]
    entry_points = importlib.metadata.entry_points(group="pytest11")
    if not any(e.value == "_jax_smfree_pytest" for e in entry_points):
        args += ["-p", "_jax_smfree_pytest"]
    return args


@pytest.fixture(autouse=True)
def subprocesses(monkeypatch, tmp_path):
    """Lets other processes import the package that this one tests, and write long lines."""
    monkeypatch.chdir(tmp_path)  # away from the sources, which `python -c` and `-m` would import
    package = str(Path(jax_smfree.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", package, prepend=os.pathsep)
    monkeypatch.setenv("COLUMNS", "200")  # pytest cuts its summary to the width


@pytest.fixture
def run_pytest(pytester, plugin_args):
    """Runs pytest in a process of its own; logs of workers go to ``logs`` in its directory."""

    def run(*args):
        return pytester.runpytest_subprocess(*plugin_args, "--multihost-logs=logs", "-ra", *args)

    return run


@pytest.fixture
def processes_of():
    """Finds the live processes that were started with logs in a directory, by their variables."""

    def find(directory):
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"JAX_SMFREE_RANK_LOG={directory}".encode() in environ.read_bytes():
                    found.append(int(environ.parent.name))
        return found

    return find


@pytest.fixture
def wait_until():
    """Waits for a condition, and says whether it came."""

    def wait(condition, timeout_s=20.0):
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    return wait
