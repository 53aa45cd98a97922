# SPDX-License-Identifier: Apache-2.0
"""``@pytest.mark.multihost`` under plain pytest: outcomes, selection, crashes, hangs, leftovers."""

import signal
import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.cpu_only


def test_outcomes(pytester, run_pytest, sample):
    pytester.makepyfile(
        sample(
            """
        ran = []

        @pytest.fixture(scope="module")
        def once(world):
            assert not ran
            ran.append(world.rank)
            yield 10 * (world.rank + 1)
            ran.append("done")

        def test_alone(world):
            assert jax.process_count() == world.num_processes == 1

        @multihost(processes=2, devices_per_process=2)
        class TestTogether:
            @pytest.mark.parametrize("k", [1, 2])
            def test_passes(self, world, once, tmp_path, k):
                assert jax.process_count() == 2 and jax.local_device_count() == 2
                assert ran == [world.rank] == [jax.process_index()]
                assert total() == 6
                assert world.exchange(once * k) == [10 * k, 20 * k]
                first = world.exchange(str(tmp_path))[0]
                assert (str(tmp_path) == first) == (world.rank == 0)

            def test_fails_on_rank_1(self, world, once):
                print("hello from rank", world.rank)
                total()
                assert world.rank == 0, "not rank 0"

            @pytest.mark.xfail(reason="on one rank")
            def test_expected_to_fail(self, world):
                assert world.rank == 0

            @pytest.mark.xfail(strict=True)
            def test_expected_to_fail_but_passes(self):
                assert total() == 6

            def test_fixture_fails_on_rank_1(self, world, request):
                request.getfixturevalue("once")
                assert total() == 6

            def test_skips(self):
                pytest.skip("in the middle")

            def test_skips_on_rank_1(self, world):
                if world.rank == 1:
                    pytest.skip("only here")

        @pytest.fixture
        def broken(world):
            assert world.rank == 0, "broken setup"

        @multihost(2, 2)
        def test_broken_setup(broken):
            assert total() == 6  # would hang if rank 0 came here

        @multihost
        @pytest.mark.parametrize("k", range(1 if "JAX_PROCESS_ID" in os.environ else 2))
        def test_collected_differently(k):
            pass

        @multihost(processes=3, devices_per_process=1)
        def test_other_shape():
            assert jax.process_count() == 3 and total() == 3

        @multihost(processes=64)
        @pytest.mark.skip(reason="starts nothing")
        def test_skipped_by_mark():
            pass

        class TestFixtureOfMainProcess:
            @pytest.fixture(scope="class", autouse=True)
            @classmethod
            def ends_badly(cls, world):
                yield
                assert world.num_processes == 2, "bad end"

            def test_alone(self):
                pass

            @multihost
            def test_together(self):
                pass

        def test_alone_again():
            assert not ran
        """
        )
    )
    result = run_pytest("-v")
    result.assert_outcomes(passed=9, failed=3, errors=3, skipped=2, xfailed=1)
    result.stdout.fnmatch_lines(
        [
            "*test_fails_on_rank_1*",
            "*AssertionError: not rank 0*",
            "*- multihost -*",
            "rank 0 passed",
            "rank 1 failed: AssertionError: not rank 0*",
            "*Captured stdout call ?rank 0?*",
            "hello from rank 0",
            "*Captured stdout call ?rank 1?*",
            "hello from rank 1",
            "*multihost logs: *logs",
            "SKIPPED * test_outcomes.py:*: starts nothing",
        ]
    )
    text = result.stdout.str()
    assert "the ranks disagree: rank 0 passed; rank 1 skipped" in text
    assert "::test_fails_on_rank_1 - rank 1: AssertionError: not rank 0" in text
    assert (
        "ERROR test_outcomes.py::test_broken_setup - rank 1: AssertionError: broken setup" in text
    )
    assert "TestFixtureOfMainProcess::test_together - AssertionError: bad end" in text
    assert "test_collected_differently[1] is not collected in all worker processes" in text
    assert {path.name for path in (pytester.path / "logs").iterdir()} == {"2x2-cpu-0", "3x1-cpu-0"}
    for rank in range(3):
        assert (pytester.path / "logs" / "3x1-cpu-0" / f"rank{rank}.log").exists()


def test_lost_ranks(pytester, run_pytest, sample):
    pytester.makepyfile(
        sample(
            """
            @multihost
            def test_crashes(world):
                if world.rank == 1:
                    os.kill(os.getpid(), signal.SIGSEGV)
                total()

            @multihost
            def test_next():
                assert total() == 6

            @multihost(timeout_s=2)
            def test_hangs(world):
                if world.rank == 1:
                    time.sleep(1000)
                total()

            @multihost
            def test_fails_while_the_other_waits(world):
                assert world.rank == 0, "the reason"
                time.sleep(1000)
            """
        )
    )
    result = run_pytest()
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines(
        [
            "rank 1 of 2 was killed by SIGSEGV.",
            "--- end of */logs/2x2-cpu-0/rank1.log:",
            "*Fatal Python error: Segmentation fault",
            '  File "*test_lost_ranks.py", line * in test_crashes',
            "rank 0 waited",
            "rank 1 crashed",
            "rank 0 of 2 did not finish within 2 s; rank 1 of 2 did not finish within 2 s.",
            '  File "*test_lost_ranks.py", line * in test_hangs',
            "*AssertionError: the reason*",
            "rank 0 hung",
            "rank 1 failed: AssertionError: the reason*",
            "rank 0 of 2 did not finish within 5 s after rank 1 had failed.",
            '  File "*test_lost_ranks.py", line * in test_fails_while_the_other_waits',
        ]
    )


def test_selection(pytester, run_pytest, sample):
    pytester.makepyfile(
        sample(
            """
        @multihost
        def test_first():
            assert total() == 6

        @multihost
        def test_second(world):
            assert world.rank == 0

        @multihost
        def test_third():
            assert total() == 6
        """
        )
    )
    logs = pytester.path / "logs"
    run_pytest("--collect-only", "-q").stdout.fnmatch_lines(["*::test_first", "*::test_third"])
    assert not logs.exists(), "collecting started processes"
    run_pytest("-x", "-k", "not first").assert_outcomes(failed=1, deselected=1)
    run_pytest("--lf").assert_outcomes(failed=1)
    assert len(list(logs.iterdir())) == 2


def test_processes_that_do_not_start(pytester, run_pytest):
    pytester.makeconftest(
        "import os\nif os.environ.get('JAX_PROCESS_ID') == '1': raise RuntimeError('no start')"
    )
    pytester.makepyfile(
        "import pytest\n@pytest.mark.multihost\n@pytest.mark.parametrize('k', range(9))\n"
        "def test_any(k): pass"
    )
    result = run_pytest()
    result.assert_outcomes(errors=9)
    result.stdout.fnmatch_lines(
        ["*processes for 2x2-cpu did not start: rank 1 of 2 ended its session*"]
    )
    assert "no start" in result.stdout.str()
    assert len(list((pytester.path / "logs").iterdir())) == 1, "tried again and again"


def test_crash_at_exit(pytester, run_pytest, sample):
    """A native library that crashes when the interpreter ends is a failure, too."""
    pytester.makepyfile(
        sample(
            """
        @multihost
        def test_passes(world):
            import atexit
            if world.rank == 1:
                atexit.register(os.kill, os.getpid(), signal.SIGABRT)
        """
        )
    )
    result = run_pytest()
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "rank 1 was killed by SIGABRT after its last test, log: " in result.stdout.str()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nodes=2", "*test_it: *unexpected*'nodes'. Expected multihost(processes=2,*"),
        ("processes='2'", "*test_it: got Multihost(processes='2',*expected at least one process*"),
        ("platform='gpu'", "*expected at least one process*"),
        ("timeout_s='60'", "*a positive number of seconds*"),
    ],
)
def test_wrong_mark(pytester, run_pytest, arguments, message):
    pytester.makepyfile(f"import pytest\n@pytest.mark.multihost({arguments})\ndef test_it(): pass")
    result = run_pytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_wrong_ini_option(pytester, run_pytest):
    pytester.makeini("[pytest]\nmultihost_timeout = soon")
    pytester.makepyfile("import pytest\n@pytest.mark.multihost\ndef test_it(): pass")
    result = run_pytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*got multihost_timeout = 'soon', expected a positive number*"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_survives_pytest(pytester, plugin_args, sample, processes_of, wait_until, number):
    pytester.makepyfile(sample("@multihost\ndef test_sleeps(): time.sleep(1000)"))
    logs = pytester.path / "logs"
    command = [sys.executable, "-m", "pytest", *plugin_args, f"--multihost-logs={logs}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as main:
        try:
            assert wait_until(lambda: len(processes_of(logs)) == 2)
            main.send_signal(number)
            main.wait(20)
        finally:
            main.kill()
    assert wait_until(lambda: processes_of(logs) == [])
