# SPDX-License-Identifier: Apache-2.0
"""Closing a group waits for what was launched; leaving the process and Ctrl-C end what waits."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
from faults.running import (
    CONFIG,
    assert_failed,
    assert_works,
    compiled,
    error_of,
    round_trip,
    run,
)
from jax_smfree.testing import launch
from support import as_many, backend, ep_mesh, make_problem

LONG = {"timeout_s": 60.0}


def first_rank_only(token, *arrays):
    """Everybody else never sends."""

    def idle(token, x, *_):
        return jnp.zeros_like(x)

    return jax.lax.cond(jax.lax.axis_index("ep") == 0, round_trip, idle, token, *arrays)


def start_waiting(group):
    """Leaves rank 0 waiting; returns what it waits to compute."""
    problem = make_problem(group.mesh)
    out = compiled(group, first_rank_only, problem)(*problem.arrays[:3])
    if backend() == "cpu":
        while group.stats()["pending_receives"] == 0:
            time.sleep(0.01)
    else:  # what a GPU waits for cannot be asked for
        time.sleep(1.0)
    return out.addressable_shards[0].data


def test_close_ends_what_waits(faulty):
    group = faulty(**LONG, at_least=2)
    waiting = start_waiting(group)
    start = time.monotonic()
    group.close(timeout_s=0.2)
    closed = (
        r"rank 0 in dispatch_recv \(running\.py:\d+ in round_trip; lane 0, forward, number 0\).*"
        "the group was closed"
    )
    assert_failed(error_of(waiting), waiting, closed)
    assert time.monotonic() - start < 2.0


def test_close_lets_a_program_under_way_end(faulty):
    """Its last rank combines when the others are through, and wait for it in a collective.

    Where XLA's collectives miss a rank for long, they end the process.
    """
    group = faulty(**LONG, at_least=2)
    problem = make_problem(group.mesh)

    def nap(rank, array):
        if rank == group.num_ranks - 1:
            time.sleep(0.2)
        return array

    def last_is_late(token, x, topk_idx, topk_weights):
        d, token = smfree.dispatch(token, x, topk_idx, topk_weights)
        token = smfree.combine_send(token, d, d.x)
        array = jax.pure_callback(nap, token.array, jax.lax.axis_index("ep"), token.array)
        array = jax.lax.pcast(array, "ep", to="varying")
        out, _ = smfree.combine_recv(dataclasses.replace(token, array=array))
        return out + 0 * jax.lax.psum(jnp.sum(out), "ep")

    out = compiled(group, last_is_late, problem)(*problem.arrays[:3])
    deadline = time.monotonic() + 30
    while group.stats()["combine_send_calls"] < group.num_ranks:
        assert time.monotonic() < deadline, "the program does not get under way"
        time.sleep(0.001)
    group.close()
    assert np.isfinite(out).all()


def test_an_error_in_the_block_ends_what_waits(faulty):
    """Nobody wants the results any more: Ctrl-C in a program that hangs."""
    group = faulty(**LONG, at_least=2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), group:
        waiting = start_waiting(group)
        raise KeyboardInterrupt
    assert_failed(error_of(waiting), waiting, "the group was closed")
    assert time.monotonic() - start < 10.0


@pytest.mark.parametrize("ranks", [1, 4])
def test_close_waits_for_what_was_launched(ranks):
    """A queue of programs, of which the last ones have not begun when the group is closed."""
    mesh = ep_mesh(as_many(ranks))
    heavy = jnp.eye(300)

    def busy_round_trip(token, x, *arrays):
        waste = jax.lax.fori_loop(0, 30, lambda _, a: jnp.tanh(a @ heavy), heavy)
        return round_trip(token, x + 0 * waste[0, 0], *arrays)

    problem = make_problem(mesh)
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        expected = np.asarray(compiled(group, round_trip, problem)(*problem.arrays[:3]))
        step = compiled(group, busy_round_trip, problem)
        results = [step(*problem.arrays[:3]) for _ in range(10)]
    assert group.stats()["dispatch_send_calls"] == 11 * group.num_ranks
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_forked_process_leaves_the_group_to_its_parent(faulty):
    """Its ``close`` has nothing to wait for: the programs, and all threads, are the parent's."""
    group = faulty(**LONG)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        signal.alarm(int(LONG["timeout_s"]))  # ends it, whatever it waits for
        try:
            group.close()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert time.monotonic() - start < LONG["timeout_s"] / 2
    assert_works(group)


def test_check_after_close(faulty):
    """Says what went wrong before, as often as it is asked."""
    group = faulty(timeout_s=1.0, at_least=2)
    run(group, first_rank_only)
    group.close()
    for _ in range(2):
        with pytest.raises(smfree.SmfreeError, match=r"rank 0 in .*: waited 1\.\d s"):
            group.check()


def test_a_fault_is_logged_once(faulty, caplog):
    """Also if nobody asks, and the program never comes back from where it waits."""
    group = faulty(timeout_s=1.0, at_least=2)
    start_waiting(group)
    deadline = time.monotonic() + 10
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("jax_smfree", "ERROR")
    assert "waited 1." in record.message and "EpGroup(axis='ep', num_ranks=" in record.message
    run(group, round_trip)  # fails because the group has
    group.close()
    assert len(caplog.records) == 1


def test_a_fault_reaches_stderr_by_default(tmp_path):
    result = in_new_process(wait_in_vain, tmp_path).check()
    text = result.processes[0].text
    assert text.count("EpGroup(axis='ep'") == 1 and "waited 1." in text


def wait_in_vain():
    """For another process: a fault that nobody asks for."""
    _, waiting = a_group_that_waits(timeout_s=1.0)
    while not waiting.is_ready():
        time.sleep(0.01)
    time.sleep(1.0)


def test_close_by_another_thread_while_waiting(faulty):
    group = faulty(**LONG, at_least=2)
    waiting = start_waiting(group)
    timer = threading.Timer(0.5, group.close, [0.2])
    timer.start()
    assert_failed(error_of(waiting), waiting, "the group was closed")
    timer.join()


def test_a_closed_group(faulty):
    """A program that was compiled before, and a new one."""
    group = faulty()
    problem = make_problem(group.mesh)
    step = compiled(group, round_trip, problem)
    assert error_of(step(*problem.arrays[:3])) is None
    group.close()
    group.close()
    with pytest.raises(Exception, match=r"the EpGroup of this program is closed.*keep it open"):
        jax.block_until_ready(step(*problem.arrays[:3]))
    with pytest.raises(ValueError, match="closed"):
        run(group, round_trip)
    # What it said and counted can still be asked.
    group.check()
    assert group.stats()["dispatch_send_calls"] == group.num_ranks


def held():
    """What the operating system gave to this process: descriptors, mappings, threads."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared mappings": sum("memfd" in line for line in maps),
        "threads": len(os.listdir("/proc/self/task")),
    }


def test_groups_that_come_and_go():
    """Created, used, closed: nothing stays."""

    def come_and_go():
        mesh = ep_mesh(as_many(4))
        with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
            assert_works(group)

    for _ in range(3):
        come_and_go()
    before = held()
    for _ in range(20 if backend() == "cpu" else 5):
        come_and_go()
    after = held()
    # Threads that complete receives come and go with the load.
    assert after["threads"] <= before["threads"] + 8
    del before["threads"], after["threads"]
    assert after == before


def a_group_that_waits(**config):
    mesh = ep_mesh(as_many(4))
    group = smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG | LONG | config))
    return group, start_waiting(group)


def leave_while_waiting():
    """For another process: ends with a receive that nobody will complete."""
    kept = a_group_that_waits()
    print("leaving", len(kept))


def interrupt_while_waiting():
    """For another process: Ctrl-C in the middle of a wait."""
    _, waiting = a_group_that_waits()
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    try:
        waiting.block_until_ready()
    except KeyboardInterrupt:
        print("interrupted")
        raise


def in_new_process(program, log_dir):
    return launch(
        program, processes=1, devices_per_process=as_many(4, at_least=2), platform=backend(),
        timeout_s=60, log_dir=log_dir,
    )  # fmt: skip


def leave_without_closing():
    """For another process."""
    mesh = ep_mesh(as_many(4))
    group = smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG))
    assert_works(group)
    print("leaving", group.num_ranks)


@pytest.mark.parametrize("leave", [leave_while_waiting, leave_without_closing])
def test_leaving_the_process(leave, tmp_path):
    (process,) = in_new_process(leave, tmp_path).check().processes
    assert "leaving" in process.text and "Traceback" not in process.text, process.text


def test_interrupt(tmp_path):
    result = in_new_process(interrupt_while_waiting, tmp_path)
    (process,) = result.processes
    assert "interrupted" in process.text, result.summary()
    assert not result.timed_out
    # Python's own exit code after an unhandled Ctrl-C.
    assert process.returncode == -signal.SIGINT, result.summary()
