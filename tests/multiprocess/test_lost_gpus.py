# SPDX-License-Identifier: Apache-2.0
"""Processes with a GPU each that die, come late or leave: a named error on the others, in time.

GPUs learn of a process that is gone by the deadline, and of one that has failed by its fault word.
"""

import signal

import pytest

from faults.handles import BAD_IN_NODES
from jax_smfree.testing.environment import visible_gpus
from multiprocess import programs
from multiprocess.running import assert_all_match, run

pytestmark = [pytest.mark.cuda_only, pytest.mark.usefixtures("no_leftovers")]
near_and_far = pytest.mark.parametrize("ranks_per_node", [2, 1], ids=["near", "far"])

TIMEOUT_S = 4.0
PROCESSES = 2


def run_gpus(program, *args, log_dir):
    return run(program, *args, log_dir=log_dir, processes=PROCESSES, devices=1, platform="cuda")


def run_nodes(program, *args, log_dir):
    """Four processes: two nodes of two."""
    if len(visible_gpus()) < 4:
        pytest.skip("needs 4 GPUs, which may be the same ones: CUDA_VISIBLE_DEVICES=0,1,0,1")
    return run(program, *args, log_dir=log_dir, processes=4, devices=1, platform="cuda")


def waits(phase):
    return rf"deadline exceeded: rank 0 in {phase} \(.*\): waited 4\.0 s for rank 1.*Fix: "


@near_and_far
def test_killed(tmp_path, ranks_per_node):
    told, result = run_gpus(
        programs.killed, str(tmp_path), "direct", TIMEOUT_S, ranks_per_node, log_dir=tmp_path
    )
    survivor, lost = result.processes
    assert lost.returncode == -signal.SIGKILL
    assert survivor.returncode == 0, result.summary()
    assert_all_match([told[0]["check"]], waits("combine_recv"))
    assert not told[0].get("finite")
    assert told[0]["seconds"] < TIMEOUT_S + 5.0
    assert told[0]["close_seconds"] < 10.0


def test_killed_in_nodes(tmp_path):
    """The relay that misses it names it, and the others either it, or that relay."""
    options = "hierarchical", TIMEOUT_S, 2
    told, result = run_nodes(programs.killed, str(tmp_path), *options, log_dir=tmp_path)
    relay, lost, *others = result.processes
    assert lost.returncode == -signal.SIGKILL
    assert_all_match([told[0]["check"]], waits("combine_send"))
    for process in (relay, *others):
        found = told[process.rank]
        assert process.returncode == 0, result.summary()
        assert not found.get("finite")
        assert found["seconds"] < TIMEOUT_S + 6.0
        assert_all_match([found["check"]], r"waited \d\.\d s for rank 1|failed first")


def test_broken_handles_in_nodes(tmp_path):
    """Each is refused by its own rank; others hear of it, or have a result that is right."""
    told, result = run_nodes(programs.spoils_handles, 2, log_dir=tmp_path)
    result.check()
    for name, bad in BAD_IN_NODES.items():
        own, *others = (told[(programs.ODD + i) % 4][name] for i in range(4))
        assert not own.get("finite")
        assert_all_match([own["check"]], rf"in {bad.phase} .*(?:{bad.words})")
        heard = [other["check"] for other in others if other["check"] is not None]
        assert_all_match(heard, r"rank \d \(in another process\) failed first")
        assert heard or bad.phase == "combine_recv"
        assert all(other["finite"] for other in others if other["check"] is None)


@near_and_far
def test_comes_late(tmp_path, ranks_per_node):
    told, result = run_gpus(programs.comes_late, 2.0, 30.0, ranks_per_node, log_dir=tmp_path)
    result.check()
    for process in told:
        assert process["errors"] == [None] and process["check"] is None and process["finite"]
    assert told[0]["seconds"] > 1.0


@near_and_far
def test_comes_too_late(tmp_path, ranks_per_node):
    """It hears of the fault at once, and does not wait for its own deadline."""
    told, result = run_gpus(
        programs.comes_late, TIMEOUT_S + 3.0, TIMEOUT_S, ranks_per_node, log_dir=tmp_path
    )
    result.check()
    assert_all_match([told[0]["check"]], waits("dispatch_recv"))
    assert_all_match(
        [told[1]["check"]],
        r"peer failed: rank 1 in combine_recv \(.*\): rank 0 \(in another process\) failed first"
        r".*Fix: ",
    )
    assert not told[0].get("finite") and not told[1].get("finite")
    assert told[1]["seconds"] < TIMEOUT_S - 1.0


def test_exits_in_the_middle(tmp_path):
    """Of near ranks: with far ones, the call of a step returns only when the others have sent."""
    told, result = run_gpus(programs.exits_in_the_middle, 2.0, TIMEOUT_S, log_dir=tmp_path)
    result.check()
    assert told[1] == {"exits": True}
    assert_all_match([told[0]["check"]], waits("combine_recv"))
    assert told[0]["seconds"] < TIMEOUT_S + 5.0
