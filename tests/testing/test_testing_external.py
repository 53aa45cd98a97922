# SPDX-License-Identifier: Apache-2.0
"""pytest under another launcher: every process is a session, and they run in lock step."""

import os
import socket
import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.cpu_only


@pytest.fixture
def run_ranks(pytester, plugin_args):
    """Starts a pytest per rank, as a launcher does that sets the JAX variables."""

    def run(*args_of_ranks):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank, args in enumerate(args_of_ranks):
            env = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "2",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(len(args_of_ranks)),
                "JAX_PROCESS_ID": str(rank),
            }
            command = [sys.executable, "-m", "pytest", "-ra", *plugin_args, *args]
            out = subprocess.PIPE
            processes.append(
                subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)
            )
        try:
            return [(p.communicate(timeout=60)[0], p.returncode) for p in processes]
        finally:
            for process in processes:
                process.kill()

    return run


def test_shared_fate(pytester, run_ranks, sample):
    pytester.makepyfile(
        sample(
            """
        def test_alone():
            raise AssertionError("expects a JAX of one process")

        @multihost(processes=2, devices_per_process=2)
        @pytest.mark.parametrize("k", [1, 2])
        def test_passes(world, k):
            assert total() == 6 and world.exchange(world.rank + k) == [k, k + 1]

        @multihost(processes=2, devices_per_process=2)
        def test_fails_on_rank_1(world):
            print("hello from rank", world.rank)
            assert world.rank == 0, "not rank 0"

        @multihost(processes=2, devices_per_process=2)
        @pytest.mark.xfail
        def test_expected_to_fail(world):
            assert world.rank == 0

        @multihost(processes=4, devices_per_process=1)
        def test_other_shape():
            pass
        """
        )
    )
    for rank, (output, code) in enumerate(run_ranks([], [])):
        assert code == pytest.ExitCode.TESTS_FAILED
        assert "1 failed, 2 passed, 1 skipped, 1 deselected, 1 xfailed" in output, output
        assert "- rank 1: AssertionError: not rank 0" in output, f"not told on rank {rank}"
        assert "hello from rank 1" in output
        assert "needs 4x1-cpu (processes x devices), this run is 2x2-cpu" in output


def test_under_our_launcher(pytester, plugin_args, sample):
    """``python -m jax_smfree.testing.launch … -- -m pytest tests``, as docs/testing.md has it."""
    source = (
        "@multihost(2, 2)\ndef test_it(world): assert total() == 6 and world.num_processes == 2"
    )
    pytester.mkdir("tests").joinpath("test_it.py").write_text(sample(source))
    launch = "-m jax_smfree.testing.launch --processes 2 --devices-per-process 2 -- -m pytest tests"
    command = [sys.executable, *launch.split(), *plugin_args]
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "multihost: rank 0 of 2, says the JAX_* variables" in done.stdout
    assert "1 passed" in done.stdout


def test_different_tests(pytester, run_ranks, sample):
    pytester.makepyfile(
        sample(
            """
        @multihost
        @pytest.mark.parametrize("k", [1, 2])
        def test_it(k):
            pass
        """
        )
    )
    for output, code in run_ranks([], ["-k", "it and 2"]):
        assert "got different tests on the ranks" in output
        assert "test_it[1]" in output and "test_it[2]" in output
        assert code == pytest.ExitCode.INTERNAL_ERROR


def test_deadlines(pytester, run_ranks, sample):
    """A process cannot interrupt a collective, so it ends itself, and says why."""
    pytester.makepyfile(
        sample(
            """
        @multihost(timeout_s=3)
        def test_hangs(world):
            time.sleep(1000 * world.rank)
            total()
        """
        )
    )
    for output, code in run_ranks([], []):
        assert code == 124
        assert "ends itself" in output and "was not over in 3 s" in output
        assert "in test_hangs" in output, "no stack"


def test_suites_without_the_mark_are_left_alone(pytester, run_ranks):
    pytester.makepyfile("def test_it():\n    import sys\n    assert 'jax' not in sys.modules")
    [(output, code)] = run_ranks([])
    assert code == 0 and "1 passed" in output


@pytest.mark.parametrize("initialize", [False, True])
def test_devices_used_in_collection(pytester, run_ranks, sample, initialize):
    if initialize:
        pytester.makeconftest("from jax_smfree import testing\ntesting.initialize()")
    pytester.makepyfile(
        sample("early = jax.devices()\n@multihost(1, 2)\ndef test_it(): assert total() == 1")
    )
    [(output, code)] = run_ranks([])
    if initialize:
        assert code == 0 and "1 passed" in output
    else:
        assert code == pytest.ExitCode.USAGE_ERROR
        assert "call jax_smfree.testing.initialize() at the top of conftest.py" in output
