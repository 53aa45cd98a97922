# SPDX-License-Identifier: Apache-2.0
"""How programs are compiled, kept, loaded and run: nothing of it changes what they compute."""

import functools
import json
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
from jax_smfree.testing import chaos, launch
from support import as_many, backend, block, ep_mesh, make_problem, mesh_of

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}


def layer_of(group, problem):
    """``(token, *arrays) -> (token, out)``, to be jitted; the token crosses its boundary."""
    spec = group.token_spec
    return jax.shard_map(
        functools.partial(block, smfree),
        mesh=problem.mesh,
        in_specs=(spec, *problem.specs),
        out_specs=(spec, problem.rows),
    )


def gradients_of(group, problem):
    """``(*arrays) -> (value, gradients)``, to be jitted, with a token of its own."""
    layer = layer_of(group, problem)

    def loss(x, idx, weights, kernel):
        return jnp.sum(layer(group.token(), x, idx, weights, kernel)[1] ** 2)

    return jax.value_and_grad(loss, argnums=(0, 2, 3))


@pytest.fixture
def setting(groups):
    mesh = ep_mesh(as_many(4))
    return groups(mesh, **CONFIG), make_problem(mesh)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("kind", ["ep", "data,ep", "explicit"])
def test_a_result_crosses_shard_maps(groups, kind):
    """What a dispatch returns leaves one shard_map and enters another, with one spec for all."""
    mesh = mesh_of(kind)
    group, problem = groups(mesh, **CONFIG), make_problem(mesh)
    spec, arrays = group.token_spec, problem.arrays[:3]

    def program(f):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))

    def dispatch(*arrays):
        return smfree.dispatch(group.token(), *arrays)[0]

    def combine(d):
        return smfree.combine(group.token(), d, d.x)[0]

    d = program(dispatch)(*arrays)
    assert d.num_dropped.shape == (mesh.size,)
    together = program(lambda *arrays: combine(dispatch(*arrays)))(*arrays)
    np.testing.assert_array_equal(program(combine)(d), together)


def test_donated_inputs(setting):
    """x and the token give their buffers away, and the results take them."""
    group, problem = setting
    layer = layer_of(group, problem)
    expected = problem.x
    kept, donating = jax.jit(layer), jax.jit(layer, donate_argnums=(0, 1))
    token = group.token()
    for _ in range(3):
        token, expected = kept(token, expected, *problem.arrays[1:])
    x, token = problem.x.copy(), group.token()
    for _ in range(3):
        given = (token.array, x)
        token, x = donating(token, x, *problem.arrays[1:])
        assert all(array.is_deleted() for array in given)
    np.testing.assert_array_equal(x, expected)


def test_ahead_of_time(setting):
    """Lowered from shapes alone; compiled once; run often, and beside the jitted one."""
    group, problem = setting
    step = jax.jit(gradients_of(group, problem))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in problem.arrays]
    ahead = step.lower(*shapes).compile()
    expected = step(*problem.arrays)
    for _ in range(3):
        assert_same(ahead(*problem.arrays), expected)
    assert_same(step(*problem.arrays), expected)


def test_several_programs_in_flight(setting):
    """Launches that nobody waits for, of two programs by turns."""
    group, problem = setting
    first, second = jax.jit(gradients_of(group, problem)), jax.jit(layer_of(group, problem))
    expected = first(*problem.arrays), second(group.token(), *problem.arrays)[1]
    results = [
        (first(*problem.arrays), second(group.token(), *problem.arrays)[1]) for _ in range(20)
    ]
    for result in results:
        assert_same(result, expected)


def test_threads_that_run_programs(setting):
    """Every thread gets its own results, though all run the same program."""
    group, problem = setting
    step = jax.jit(layer_of(group, problem))
    wrong = []

    def run(factor):
        x = problem.x * factor
        expected = np.asarray(step(group.token(), x, *problem.arrays[1:])[1])
        for _ in range(30):
            out = np.asarray(step(group.token(), x, *problem.arrays[1:])[1])
            wrong.append(not np.array_equal(out, expected))

    threads = [threading.Thread(target=run, args=[factor]) for factor in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 90 and not any(wrong)


def test_token_in_flight_crosses_jit_boundaries(setting):
    """The send in one program, the recv in another one, with a third in between on another run."""
    group, problem = setting
    smap = functools.partial(jax.shard_map, mesh=problem.mesh)
    spec = group.token_spec
    rows = problem.rows

    @jax.jit
    @functools.partial(smap, in_specs=(spec, *problem.specs[:3]), out_specs=spec)
    def send(token, x, idx, weights):
        return smfree.dispatch_send(token, x, idx, weights)

    @jax.jit
    @functools.partial(smap, in_specs=spec, out_specs=(spec, rows))
    def receive_and_return(token):
        d, token = smfree.dispatch_recv(token)
        out, token = jax.jit(smfree.combine)(token, d, d.x)
        return token, out

    token, first = receive_and_return(send(group.token(), *problem.arrays[:3]))
    for _ in range(3):
        token = send(token, *problem.arrays[:3])
        jax.block_until_ready(jax.jit(jnp.sin)(problem.x))
        assert token.state is not None
        token, again = receive_and_return(token)
        np.testing.assert_array_equal(again, first)
    assert token.state is None


# ---- in other processes --------------------------------------------------------------------------


def in_new_process(program, *args, log_dir):
    return launch(
        program, args=args, processes=1, devices_per_process=as_many(4), platform=backend(),
        log_dir=log_dir,
    ).check()  # fmt: skip


def busy_fraction():
    """CPU time over wall time of this process, the least of three seconds."""
    fractions = []
    for _ in range(3):
        wall, cpu = time.monotonic(), time.process_time()
        time.sleep(1.0)
        fractions.append((time.process_time() - cpu) / (time.monotonic() - wall))
    return min(fractions)


def idle_and_waiting():
    """For another process: nothing runs; then all ranks wait for a mover that stands still."""
    mesh = ep_mesh(as_many(4))
    problem = make_problem(mesh)
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        step = jax.jit(layer_of(group, problem))
        jax.block_until_ready(step(group.token(), *problem.arrays))
        print(json.dumps(busy_fraction()))
        with chaos(group, stall_probability=1.0, stall_ms=4000):
            out = step(group.token(), *problem.arrays)
            while group.stats()["pending_receives"] < group.num_ranks:
                time.sleep(0.01)
            print(json.dumps(busy_fraction()))
            jax.block_until_ready(out)


@pytest.mark.cpu_only
def test_idle_ranks_use_no_cpu(tmp_path):
    (process,) = in_new_process(idle_and_waiting, log_dir=tmp_path).processes
    idle, waiting = map(json.loads, process.text.splitlines()[-2:])
    assert idle < 0.02
    assert waiting < 0.02


def run_with_cache(cache, result):
    """For another process: compiles, or finds the compiled program in ``cache``."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    events = []
    mesh = ep_mesh(as_many(4))
    problem = make_problem(mesh)
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
        out = jax.jit(gradients_of(group, problem))(*problem.arrays)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(out)]
    hits, misses = (
        events.count(f"/jax/compilation_cache/cache_{what}") for what in ("hits", "misses")
    )
    np.savez(result, *leaves, hits=hits, misses=misses)


def test_compilation_cache_across_processes(tmp_path):
    """The second process finds the first one's program, because nothing of a process is in it."""
    cache = tmp_path / "cache"
    for name in ("first", "second"):
        in_new_process(
            run_with_cache, str(cache), str(tmp_path / f"{name}.npz"), log_dir=tmp_path / name
        )
        files = {path.name for path in cache.iterdir() if not path.name.endswith("-atime")}
        if name == "first":
            written = files
    first, second = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("first", "second"))
    assert first.pop("misses") > 0 and first.pop("hits") == 0
    assert second.pop("misses") == 0 and second.pop("hits") > 0
    assert files == written
    assert_same(second, first)


def export_program(path, result):
    """For another process: writes a serialised program, and what it computes."""
    mesh = ep_mesh(as_many(4))
    problem = make_problem(mesh)
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        step = jax.jit(gradients_of(group, problem))
        with pytest.raises(ValueError, match="smfree_dispatch_send"):
            jax.export.export(step)(*problem.arrays)
        exported = jax.export.export(step, disabled_checks=smfree.DISABLE_JAX_EXPORT_CHECKS)(
            *problem.arrays
        )
        Path(path).write_bytes(exported.serialize())
        np.savez(result, *jax.tree.leaves(step(*problem.arrays)))


def run_exported(path, result):
    """For another process: knows the configuration and the arrays, but no line of the model."""
    mesh = ep_mesh(as_many(4))
    problem = make_problem(mesh)
    exported = jax.export.deserialize(bytearray(Path(path).read_bytes()))
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)):
        out = jax.jit(exported.call)(*problem.arrays)
        np.savez(result, *jax.tree.leaves(out))


def test_export(tmp_path):
    program = str(tmp_path / "program.bin")
    for function, name in ((export_program, "first"), (run_exported, "second")):
        in_new_process(function, program, str(tmp_path / f"{name}.npz"), log_dir=tmp_path / name)
    first, second = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("first", "second"))
    assert len(first) == 4
    assert_same(second, first)
