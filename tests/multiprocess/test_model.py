# SPDX-License-Identifier: Apache-2.0
"""An MoE block over several processes, forward and backward, against the reference."""

import functools
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import jax_smfree as smfree
from jax_smfree._src import reference
from jax_smfree.testing import chaos
from support import assert_trees_close, block, make_problem, reference_of

pytestmark = pytest.mark.cpu_only

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}
LAYERS = 2

MESHES = {
    "ep": lambda d: Mesh(d, ("ep",)),
    "ep by turns": lambda d: Mesh(d.reshape(2, 2).T.reshape(-1)[::-1], ("ep",)),
    "data over processes": lambda d: Mesh(d.reshape(2, 2), ("data", "ep")),
    "ep over processes": lambda d: Mesh(d.reshape(2, 2), ("ep", "data")),
}


def compile_value_and_grads(ops, token, problem):
    """Of a scan over layers; ``token()`` makes the first token. The result is whole everywhere."""

    def local(*arrays):
        layer = jax.checkpoint(functools.partial(block, ops))

        def step(carry, _):
            return layer(*carry, *arrays[1:]), None

        (_, out), _ = jax.lax.scan(step, (token(), arrays[0]), length=LAYERS)
        return jnp.sum(out**2)[None]

    smap = jax.shard_map(local, mesh=problem.mesh, in_specs=problem.specs, out_specs=problem.rows)

    def loss(*arrays):
        return jnp.sum(smap(*arrays))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3)))
    return lambda: multihost_utils.process_allgather(step(*problem.arrays), tiled=True)


MODES = {"ep": "hierarchical", "ep by turns": "direct"}  # the others have one rank in a node


@pytest.mark.multihost(processes=2, devices_per_process=2)
@pytest.mark.parametrize("kind", MESHES)
def test_gradients(groups, world, kind):
    mesh = MESHES[kind](np.array(jax.devices()))
    if kind == "ep by turns":
        with pytest.raises(ValueError, match=r"hosts\) \[\[1, 0, 1, 0\]\], expected nodes"):
            groups(mesh, **CONFIG)
    group = groups(mesh, **CONFIG, mode="direct" if kind == "ep by turns" else None)
    assert group.config.mode == MODES.get(kind, "direct")
    problem = make_problem(mesh)
    step = compile_value_and_grads(smfree, group.token, problem)
    expected = compile_value_and_grads(reference, reference_of(group).token, problem)()
    actual = step()
    assert_trees_close(actual, expected)
    # What a process runs on its own devices does not disturb the count of common launches.
    for i in range(3 * world.rank):
        jax.jit(lambda x, i=i: jnp.sin(x) + i)(jnp.float32(i)).block_until_ready()
    jax.tree.map(np.testing.assert_array_equal, step(), actual)
    for seed in range(3):
        world.barrier()
        with chaos(group, seed=10 * seed + world.rank, max_delay_us=1000):
            jax.tree.map(np.testing.assert_array_equal, step(), actual)
            world.barrier()  # what one process holds back, another one waits for
    world.barrier()  # a group is closed when nobody needs it any more


@pytest.mark.multihost(processes=2, devices_per_process=2)
def test_two_groups_at_once(groups, world):
    """One over processes and one inside of each, used by turns in one program."""
    mesh = MESHES["ep over processes"](np.array(jax.devices()))
    across = groups(mesh, "ep", **CONFIG)
    within = groups(mesh, "data", **CONFIG)
    problem = make_problem(mesh)

    def both(ops, tokens):
        def local(*arrays):
            _, x = block(ops, tokens[0](), *arrays)
            _, x = block(ops, tokens[1](), x, *arrays[1:])
            return x

        smap = jax.shard_map(local, mesh=mesh, in_specs=problem.specs, out_specs=problem.rows)
        return multihost_utils.process_allgather(jax.jit(smap)(*problem.arrays), tiled=True)

    actual = both(smfree, (across.token, within.token))
    expected = both(reference, (reference_of(across).token, reference_of(within).token))
    assert_trees_close(actual, expected)
    world.barrier()


@pytest.mark.multihost(processes=2, devices_per_process=2)
def test_groups_that_come_and_go(world):
    """Created, used, closed, in both processes: no memory, descriptor or mapping stays."""
    mesh = MESHES["ep"](np.array(jax.devices()))
    problem = make_problem(mesh)

    def come_and_go():
        with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
            smap = jax.shard_map(
                lambda *arrays: block(smfree, group.token(), *arrays)[1],
                mesh=mesh,
                in_specs=problem.specs,
                out_specs=problem.rows,
            )
            step = jax.jit(smap).lower(*problem.arrays).compile()
            for _ in range(20):
                jax.block_until_ready(step(*problem.arrays))
            world.barrier()
            # Rows are given back by their readers, in the other process.
            deadline = time.monotonic() + 10
            while group.memory_report()["arena_bytes_in_use"] and time.monotonic() < deadline:
                time.sleep(0.01)
            assert group.memory_report()["arena_bytes_in_use"] == 0
            world.barrier()

    def held():
        maps = Path("/proc/self/maps").read_text().splitlines()
        return len(os.listdir("/proc/self/fd")), sum("memfd" in line for line in maps)

    come_and_go()
    before = held()
    for _ in range(5):
        come_and_go()
    assert held() == before
