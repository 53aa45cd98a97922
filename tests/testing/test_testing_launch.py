# SPDX-License-Identifier: Apache-2.0
"""`launch` and its command line: what is started, what is reported, and that nothing is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_smfree.testing import LaunchError, launch

pytestmark = pytest.mark.cpu_only

SLEEP = "import time; time.sleep(1000)"
RANK = "import os; rank = int(os.environ['JAX_PROCESS_ID']); "


def write(number, *, to):
    """Runs in the launched processes."""
    Path(to, os.environ["JAX_PROCESS_ID"]).write_text(str(number))


def test_processes_compute_together(tmp_path, sample):
    program = tmp_path / "program.py"
    program.write_text(
        "from jax_smfree import testing\ntesting.initialize()\n" + sample("print('sum', total())")
    )
    result = launch(program, processes=2, devices_per_process=2, log_dir=tmp_path / "logs").check()
    assert [p.returncode for p in result.processes] == [0, 0]
    for rank, process in enumerate(result.processes):
        assert process.log == tmp_path / "logs" / f"rank{rank}.log"
        assert "sum 6.0" in process.text


def test_arguments_and_environment(tmp_path):
    code = RANK + "import sys; print(rank, sys.argv[1:], os.environ['XLA_FLAGS'], os.environ['A'])"
    env = {"A": "b", "XLA_FLAGS": "--x=1 --xla_force_host_platform_device_count=8"}
    result = launch(["-c", code], args=["y"], devices_per_process=3, env=env, log_dir=tmp_path)
    wanted = "['y'] --x=1  --xla_force_host_platform_device_count=3 b"
    assert [p.text.strip() for p in result.check().processes] == [f"{i} {wanted}" for i in (0, 1)]


def test_function(tmp_path):
    launch(append, args=(7, str(tmp_path)), processes=3, log_dir=tmp_path / "logs").check()
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["7"] * 3


def append(number, directory):
    write(number, to=directory)


@pytest.mark.parametrize(
    ("program", "args", "message"),
    [
        (lambda: None, (), "expected a function of a module's top level"),
        (append, (object(),), "expected literals"),
    ],
)
def test_functions_that_no_other_process_can_find(program, args, message):
    with pytest.raises(TypeError, match=message):
        launch(program, args=args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": [1]}, "got 1 among args, expected strings or paths.* Write it as a string"),
        ({"args": "ab"}, "got args='ab', expected a list or tuple"),
        ({"program": []}, "got program=a list, expected a script's path"),
        ({"program": None}, "got program=None, expected a script's path"),
        ({"program": append, "args": (1,)}, "for append: missing a required argument"),
        ({"processes": "2"}, "got processes='2', expected a whole number"),
        ({"devices_per_process": 0}, "got devices_per_process=0"),
        ({"platform": "gpu"}, "got platform='gpu', expected 'cpu' or 'cuda'"),
        ({"timeout_s": "60"}, "got timeout_s='60', expected a number of seconds"),
        ({"timeout_s": float("nan")}, "got timeout_s=nan"),
        ({"survivors_s": -1}, "got survivors_s=-1"),
        ({"env": {"A": 1}}, "got env=a dict, expected a mapping of strings"),
        ({"cwd": "/nowhere"}, "got cwd='/nowhere', expected a directory"),
        ({"log_dir": __file__}, "test_testing_launch.py', expected a directory"),
    ],
)
def test_arguments_that_are_refused(options, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=f"^launch: .*{message}"):
        launch(**{"program": ["-c", ""], "log_dir": tmp_path / "logs"} | options)
    assert not (tmp_path / "logs").exists()


def test_a_rank_that_fails(tmp_path):
    code = RANK + f"print('rank', rank); rank == 1 and os._exit(3); {SLEEP}"
    result = launch(["-c", code], processes=3, survivors_s=0.3, log_dir=tmp_path)
    assert not result.ok and not result.timed_out
    assert result.first_failed == 1 and result.processes[1].returncode == 3
    assert [p.stopped for p in result.processes] == [True, False, True]
    with pytest.raises(LaunchError, match=r"rank 1 exited with code 3") as error:
        result.check()
    assert "rank 1 failed first" in str(error.value)


def test_survivors_may_go_on(tmp_path):
    code = RANK + "rank == 1 and os.kill(os.getpid(), 9); import time; time.sleep(1); print('here')"
    result = launch(["-c", code], survivors_s=None, log_dir=tmp_path)
    assert "here" in result.processes[0].text and result.processes[0].returncode == 0
    assert str(result.processes[1]) == "rank 1 was killed by SIGKILL"


def test_deadline(tmp_path, processes_of, wait_until):
    """Each rank has a child of its own, in its process group, that would outlive it."""
    code = (
        "import subprocess, sys; from jax_smfree import testing; testing.initialize(); "
        f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); " + SLEEP
    )
    start = time.monotonic()
    result = launch(["-c", code], processes=1, timeout_s=4, log_dir=tmp_path)
    assert result.timed_out and time.monotonic() - start < 15
    assert "(most recent call first)" in result.processes[0].text, "no stack in the log"
    assert wait_until(lambda: processes_of(tmp_path) == [])


def test_leftovers_of_a_rank_that_ended(tmp_path, processes_of, wait_until):
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}])"
    assert launch(["-c", code], log_dir=tmp_path).ok
    assert wait_until(lambda: processes_of(tmp_path) == [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_survives_the_launcher(tmp_path, processes_of, wait_until, number):
    command = [sys.executable, "-m", "jax_smfree.testing.launch", f"--log-dir={tmp_path}"]
    launcher = subprocess.Popen([*command, "--", "-c", SLEEP])
    try:
        assert wait_until(lambda: len(processes_of(tmp_path)) == 2)
        launcher.send_signal(number)
        code = launcher.wait(20)
    finally:
        launcher.kill()
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert wait_until(lambda: processes_of(tmp_path) == [])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('hello')", 0),
        (RANK + "rank == 1 and os._exit(5); print('hello')", 5),
        (RANK + "print('hello', flush=True); rank or os.kill(os.getpid(), 11)", 128 + 11),
        (f"print('hello', flush=True); {SLEEP}", 124),
    ],
)
def test_command_line(tmp_path, monkeypatch, code, expected):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "jax_smfree.testing.launch", "--timeout=3", "--", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == expected
    assert "hello" in done.stdout  # of rank 0
    assert ("end of /" in done.stderr) == (expected != 0)
    assert len(list(tmp_path.iterdir())) == (expected != 0), "logs are kept when it failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: -- PROGRAM"),
        (("--processes=0", "x.py"), "got processes=0"),
        (("--processes=two", "x.py"), "invalid int value: 'two'"),
        (("--devices-per-process=0", "x.py"), "got devices_per_process=0"),
        (("--platform=gpu", "x.py"), "invalid choice: 'gpu'"),
        (("--platform=cuda", "--processes=64", "x.py"), "visible GPUs, expected 64"),
        (("--timeout=nan", "x.py"), "got timeout_s=nan"),
        (("--timeout=-1", "x.py"), "got timeout_s=-1.0"),
        ((f"--log-dir={__file__}", "x.py"), "expected a directory"),
        ((f"--log-dir={__file__}/logs", "x.py"), "Not a directory"),
    ],
)
def test_command_line_says_what_is_wrong(arguments, message, capsys):
    from jax_smfree.testing.launch.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
