# SPDX-License-Identifier: Apache-2.0
"""Operations that are sent and never received do not pile up in silence.

On GPUs the first one for which no set of buffers is free is refused.
"""

import time

import jax
import pytest

import jax_smfree as smfree
from faults.running import CONFIG, assert_works, compiled, error_of, shards_of
from support import as_many, ep_mesh, make_problem

pytestmark = pytest.mark.cpu_only


def send_only(token, x, topk_idx, topk_weights):
    # What nothing depends on JAX does not even run.
    return smfree.dispatch_send(token, x, topk_idx, topk_weights).array


def errors_of_runs(group, runs):
    problem = make_problem(group.mesh)
    step = compiled(group, send_only, problem)
    errors = []
    for _ in range(runs):
        errors.append([error_of(shard) for shard in shards_of(step(*problem.arrays[:3]))])
    return errors


def test_they_are_a_fault_when_they_are_many(faulty, caplog):
    group = faulty()
    errors = errors_of_runs(group, 30)
    fine = [[None] * group.num_ranks] * 17
    assert errors[:17] == fine and None not in errors[18]
    told = (
        r"rank \d in dispatch_send .* begins, and in earlier runs this rank has sent and never "
        r"received 17 operation\(s\), of which 0\.\d MB lie unread here: 17 times dispatch "
        r"\(test_unreceived\.py:\d+ in send_only; lane 0, forward, number 0\)\. Fix: receive"
    )
    with pytest.raises(smfree.SmfreeError, match=told):
        group.check()
    assert group.memory_report()["arena_bytes_in_use"] == 0
    group.close()
    deadline = time.monotonic() + 10  # another thread writes it
    while "never received" not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)


def test_what_is_left_is_told_when_the_group_is_closed(caplog):
    with smfree.EpGroup.create(ep_mesh(as_many(4)), config=smfree.EpConfig(**CONFIG)) as group:
        assert errors_of_runs(group, 3) == [[None] * group.num_ranks] * 3
        assert_works(group)  # what lies there is in nobody's way
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"never received {3 * group.num_ranks} operation(s)" in record.message
    assert f"{3 * group.num_ranks} times dispatch (test_unreceived.py:" in record.message


def test_a_token_in_flight_may_leave_its_program(caplog):
    """Sends of some runs are received in later ones, in any order."""
    mesh = ep_mesh(as_many(4))
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        problem = make_problem(mesh)
        spec, rows = group.token_spec, jax.sharding.PartitionSpec("ep")

        def local(function, in_specs, out_specs):
            return jax.jit(
                jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
            )

        send = local(smfree.dispatch_send, (spec, *[rows] * 3), spec)
        receive = local(lambda token: smfree.dispatch_recv(token)[0].x, (spec,), rows)
        in_flight = [send(group.token(), *problem.arrays[:3]) for _ in range(10)]
        results = [receive(token) for token in reversed(in_flight)]
        for result in results:
            assert (result == results[0]).all()
        assert_works(group)
    assert not caplog.records
