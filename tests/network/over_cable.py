# SPDX-License-Identifier: Apache-2.0
"""What `test_cables` runs in a pytest on each host; no file that pytest collects by itself."""

import socket
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree._src import bootstrap
from network.programs import MODES, own
from support import ep_mesh, make_problem


def placed(mode, processes, platform="cuda"):
    where = {"processes": processes, "devices_per_process": 1, "platform": platform}
    only = getattr(pytest.mark, f"{platform}_only")
    return pytest.param(mode, marks=[only, pytest.mark.multihost(**where)])


ROWS, HIDDEN, TOP_K, STEPS = 2048, 1024, 2, 3
# Headers of IP, TCP and UCX, what TCP sends twice, and the answers to the other side.
OVERHEAD = 0.05
# Headers of messages and signals, announcements, and JAX's coordinator.
MORE_BYTES = 2**20


def sent_on_the_cable():
    """Bytes that the interface of this host has counted."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (counts,) = (line.split(":")[1] for line in lines if line.strip().startswith("cable:"))
    return int(counts.split()[8])


@pytest.mark.parametrize(
    "mode",
    [
        placed("portable", 2, "cpu"),
        placed("direct", 2),
        placed("device", 2),
        placed("hierarchical", 4),
    ],
)
def test_bytes_on_the_wire(groups, world, mode):
    """Of dispatches and combines: the interfaces count what ``group.stats()`` says.

    The rates say nothing of a network. That of the link, one plain TCP connection, is beside them.
    """
    mesh = ep_mesh(world.num_processes)
    sizes = {"num_experts": 8, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": ROWS}
    group = groups(mesh, **sizes, **MODES[mode], dtype=jnp.float32, timeout_s=30)
    problem = make_problem(mesh, tokens=ROWS, hidden=HIDDEN)

    def local(x, topk_idx, topk_weights):
        d, token = smfree.dispatch(group.token(), x, topk_idx, topk_weights)
        return smfree.combine(token, d, d.x)[0]

    specs = {"in_specs": P("ep"), "out_specs": P("ep")}
    step = jax.jit(jax.shard_map(local, mesh=mesh, **specs)).lower(*problem.arrays[:3]).compile()

    def counted(steps):
        stats = group.stats()
        if mode == "portable":  # which counts none: room for all rows goes to the other rank
            ours = steps * 2 * ROWS * HIDDEN * 4
        else:
            ours = stats["dispatch_internode_bytes"] + stats["combine_internode_bytes"]
        there = world.exchange([bootstrap.host_name(), sent_on_the_cable(), ours])
        wires = {host: wire for host, wire, _ in there}
        return np.array([sum(wires.values()), sum(ours for *_, ours in there)])

    jax.block_until_ready(step(*problem.arrays[:3]))
    before = counted(0)
    begin = time.monotonic()
    for _ in range(STEPS):
        out = jax.block_until_ready(step(*problem.arrays[:3]))
    seconds = time.monotonic() - begin
    wire, ours = counted(STEPS) - before
    group.check()
    weights = own(problem.topk_weights) * (own(problem.topk_idx) >= 0)
    expected = own(problem.x) * weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(own(out), expected, rtol=1e-5, atol=1e-5)

    assert ours > STEPS * ROWS * HIDDEN  # some rows go to the other host
    assert ours <= wire <= (1 + OVERHEAD) * ours + MORE_BYTES
    rate = link_rate(world)
    if world.rank == 0:
        print(
            f"WIRE {mode}: {ours:,} bytes of rows, {wire:,} on the wire; "
            f"{ours / 2 / seconds / 1e6:.0f} MB/s in each direction, a plain TCP connection "
            f"{rate / 1e6:.0f} MB/s"
        )
    world.barrier()


def link_rate(world, megabytes=256):
    """Bytes per second of one TCP connection from the last process to the first one."""
    first, last = world.rank == 0, world.rank == world.num_processes - 1
    server = socket.create_server(("", 0)) if first else None
    address = world.exchange([bootstrap.host_name(), server and server.getsockname()[1]])[0]
    received, begin = 0, time.monotonic()
    if server:
        connection, _ = server.accept()
        with server, connection:
            while piece := connection.recv(2**20):
                received += len(piece)
    elif last:
        with socket.create_connection(tuple(address)) as connection:
            for _ in range(megabytes):
                connection.sendall(bytes(2**20))
    return world.exchange(received / (time.monotonic() - begin))[0]
