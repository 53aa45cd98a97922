# SPDX-License-Identifier: Apache-2.0
"""Processes that die, stay away, disagree or leave: a named error on all others, in time."""

import signal

import pytest

from multiprocess import programs
from multiprocess.running import assert_all_match, run

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("no_leftovers")]


@pytest.mark.parametrize(
    "mode, processes, devices",
    [("direct", 2, 2), ("direct", 4, 1), ("hierarchical", 2, 2), ("hierarchical", 4, 2)],
)
def test_killed(tmp_path, mode, processes, devices):
    """The connection's end tells, long before the deadline."""
    told, result = run(
        programs.killed, str(tmp_path), mode, log_dir=tmp_path, processes=processes, devices=devices
    )
    lost = list(range(devices * programs.ODD, devices * (programs.ODD + 1)))
    named = rf"rank\(s\) {', '.join(map(str, lost))} \(process {programs.ODD}\) died.*Fix: "
    for rank, process in enumerate(result.processes):
        if rank == programs.ODD:
            assert process.returncode == -signal.SIGKILL
            continue
        assert process.returncode == 0, result.summary()
        assert len(told[rank]["errors"]) == devices
        assert_all_match(told[rank]["errors"], r"in \w+_(send|recv) .*" + named)
        assert_all_match([told[rank]["check"]], named)
        assert told[rank]["seconds"] < 10.0  # of a deadline of 60
        assert told[rank]["close_seconds"] < 10.0


def test_killed_while_others_wait_elsewhere(tmp_path):
    """The survivors say what has happened, where JAX would be silent for minutes."""
    told, result = run(
        programs.killed_while_others_wait_elsewhere, str(tmp_path), log_dir=tmp_path, devices=2
    )
    assert result.processes[0].returncode == 0, result.summary()
    assert_all_match([told[0]["log"]], r"EpGroup.* failed: rank\(s\) 2, 3 \(process 1\) died")
    assert told[0]["seconds"] < 20.0


NEVER_SENDS = {
    "direct": r"rank [01] in dispatch_recv \(.*\): waited 2\.\d s for rank 2: .*; for rank 3: ",
    # Each rank receives from the one of its index in the other node.
    "hierarchical": r"rank ([01]) in dispatch_recv \(.*\): waited 2\.\d s for rank (?!\1)[23]: ",
}


@pytest.mark.parametrize("mode", NEVER_SENDS)
def test_never_sends(tmp_path, mode):
    told, result = run(programs.never_sends, mode, log_dir=tmp_path)
    result.check()
    waits = NEVER_SENDS[mode]
    assert_all_match(told[0]["errors"], waits)
    assert told[0]["seconds"] < 4.0
    assert_all_match([told[0]["check"], told[1]["check"]], waits)  # it is told, too


def test_runs_another_program(tmp_path):
    told, result = run(programs.runs_another_program, log_dir=tmp_path)
    result.check()
    # JAX numbers the launches of each program by itself, so nothing that comes from another program
    # can be meant for this one: it lies there unread.
    waits = (
        r"rank (\d) in dispatch_recv \(.*\): waited 3\.\d s for rank (\d): nothing arrived; last "
        r"from rank \2: dispatch number 0 .* of another run; .*Fix: "
    )
    for process in told:
        assert len(process["errors"]) == 2
        assert_all_match([*process["errors"], process["check"]], waits)
        assert process["seconds"] < 5.0


MISMATCHES = {
    "line": r"expected dispatch number 0 .* in (\w+); .* got dispatch number 0 .* in (?!\1)\w+;",
    "rows": "got another call of that line .* of (3 rows per rank instead of 6|6 .* instead of 3)",
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_takes_another_branch(tmp_path, what):
    told, result = run(programs.takes_another_branch, what, log_dir=tmp_path)
    result.check()
    for process in told:
        errors = [*process["errors"], process["check"]]
        assert len(errors) == 3
        assert_all_match(errors, r"schedule mismatch: rank \d .* from rank \d.*Fix: ")
        assert_all_match(errors, MISMATCHES[what])
        assert process["seconds"] < 10.0


def test_closes_too_early(tmp_path):
    told, result = run(programs.closes_too_early, log_dir=tmp_path)
    result.check()
    named = (
        r"rank\(s\) 2, 3 \(process 1\) closed its group, and rank [01] in dispatch_recv .* waits"
    )
    assert_all_match([*told[0]["errors"], told[0]["check"]], named)
    assert told[0]["seconds"] < 10.0


def test_exits_in_the_middle(tmp_path):
    """Its end does not wait for the others, and they learn of it at once."""
    told, result = run(programs.exits_in_the_middle, 3.0, log_dir=tmp_path)
    result.check()
    assert told[1] == {"exits": True}
    named = r"rank\(s\) 2, 3 \(process 1\) closed its group, and rank [01] in combine_recv .* waits"
    assert_all_match([*told[0]["errors"], told[0]["check"]], named)
    assert told[0]["seconds"] < 10.0


def test_another_config(tmp_path):
    told, result = run(programs.another_config, log_dir=tmp_path)
    result.check()
    for me, process in enumerate(told):
        hidden = {True: "hidden=16", False: "hidden=32"}
        assert_all_match(
            [process["error"]],
            rf"process {1 - me} creates .*{hidden[me != 0]}.*process {me} creates .*"
            rf"{hidden[me == 0]}.*same mesh, axis and config",
        )


@pytest.mark.parametrize("absent", [0, 1])
def test_does_not_create(tmp_path, absent):
    """And then it does: both sides look for each other at the same place again."""
    told, result = run(programs.does_not_create, absent, log_dir=tmp_path)
    result.check()
    assert_all_match(
        [told[1 - absent]["error"]],
        rf"process {1 - absent} waited 2 s for process {absent} to come to the same call.*"
        "collective",
    )
    assert told[1 - absent]["seconds"] < 6.0
    assert [process["left"] for process in told] == [[], []]


def test_creates_without_descriptors(tmp_path):
    told, result = run(programs.creates_without_descriptors, log_dir=tmp_path)
    result.check()
    assert_all_match(
        [told[1]["error"]], r"^EpGroup\.create: .*failed: Too many open files.*Fix: .*ulimit -n"
    )
    assert_all_match([told[0]["error"]], r"^EpGroup\.create: .* process(\(es\))? 1 ")


def test_pauses(tmp_path):
    told, result = run(programs.pauses, 5.0, log_dir=tmp_path)
    result.check()
    for process in told:
        assert process["paused"] > 4.9  # they leave together
        assert process["errors"] == [None, None] and process["check"] is None


def test_dies_in_a_pause(tmp_path):
    told, result = run(programs.dies_in_a_pause, str(tmp_path), log_dir=tmp_path)
    assert result.processes[0].returncode == 0, result.summary()
    assert_all_match([told[0]["error"]], r"rank\(s\) 2, 3 \(process 1\) died")
    assert told[0]["seconds"] < 10.0
