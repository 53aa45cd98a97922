# SPDX-License-Identifier: Apache-2.0
"""Traces say whose they are: replica, rank, lane."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from faults.running import CONFIG, round_trip
from support import devices, make_problem

pytestmark = pytest.mark.cuda_only

PAIR = {"processes": 2, "devices_per_process": 1, "platform": "cuda"}


def replicas_of_traces(groups):
    """Two groups of one rank; the replicas of what they trace here."""
    mesh = Mesh(devices(2).reshape(2, 1), ("data", "ep"))
    group = groups(mesh, **CONFIG, sm_push_bytes=0)
    problem = make_problem(mesh)

    def local(*arrays):
        return round_trip(group.token(), *arrays)

    specs = P(mesh.axis_names)
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))
    jax.block_until_ready(step(*problem.arrays[:3]))
    trace = group.trace()
    assert {record["rank"] for record in trace} == {0}
    assert len({record["phase"] for record in trace}) == 4
    return {record["replica"] for record in trace}


def test_replicas_of_one_process(groups):
    assert replicas_of_traces(groups) == {0, 1}


@pytest.mark.multihost(**PAIR)
def test_replicas_of_two_processes(groups, world):
    assert replicas_of_traces(groups) == {jax.process_index()}
    world.barrier()


def test_the_wire_knows_its_replica(groups):
    """Of the one group that sends anything to another rank."""
    group = groups(Mesh(devices(2), ("ep",)), **CONFIG, sm_push_bytes=0)
    problem = make_problem(group.mesh)

    def local(*arrays):
        return round_trip(group.token(), *arrays)

    step = jax.jit(jax.shard_map(local, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep")))
    jax.block_until_ready(step(*problem.arrays[:3]))
    group.start_wire_trace()
    np.asarray(step(*problem.arrays[:3]))
    chunks = group.end_wire_trace()
    assert {(chunk["replica"], chunk["rank"], chunk["peer"]) for chunk in chunks} == {
        (0, 0, 1),
        (0, 1, 0),
    }
