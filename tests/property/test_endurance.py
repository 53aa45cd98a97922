# SPDX-License-Identifier: Apache-2.0
"""Many operations in a row, and many at once; every value is checked where it arrives."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree.testing import launch
from property.self_checking import SelfChecking
from support import as_many, backend, block, chaos_on_cpu, ep_mesh, make_problem


def test_ten_thousand_operations_under_chaos():
    """On two lanes, with delays, reordering and pauses."""
    exchange = SelfChecking(ranks=as_many(4), tokens=4, hidden=8, lanes=2)
    rounds = 10_000 // (2 * exchange.lanes)
    mesh = ep_mesh(exchange.ranks)
    group = smfree.EpGroup.create(mesh, config=exchange.config())

    def local():
        def step(i, carry):
            tokens, wrong = list(carry[0]), carry[1]
            for lane in range(exchange.lanes):
                number = exchange.lanes * i + lane
                tokens[lane], d, wrong_here = exchange.wrong_results(tokens[lane], number)
                wrong += wrong_here + exchange.wrong_rows(d, number)
            return tokens, wrong

        tokens = [group.token(lane) for lane in range(exchange.lanes)]
        zero = jax.lax.pcast(jnp.int32(0), "ep", to="varying")
        tokens, wrong = jax.lax.fori_loop(0, rounds, step, (tokens, zero))
        return wrong[None], jnp.stack([token.array for token in tokens])[None]

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=P("ep")))
    bad = {"max_delay_us": 100, "stall_probability": 1e-4, "stall_ms": 3}
    with group, chaos_on_cpu(group, seed=7, **bad):
        wrong, tokens = map(np.asarray, step())
        group.check()
        stats = settled_stats(group) if backend() == "cpu" else group.stats()
        memory = group.memory_report()
    np.testing.assert_array_equal(wrong, 0)
    if backend() == "cpu":
        np.testing.assert_array_equal(tokens[..., 2], 2 * rounds)  # the next operation's number
    else:  # a GPU counts the operations of all lanes, and its numbers have a bit more
        np.testing.assert_array_equal(tokens[..., 2].max() // 2, 2 * rounds * exchange.lanes)
    operations = exchange.lanes * rounds * exchange.ranks
    for phase in ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv"):
        assert stats[f"{phase}_calls"] == operations
    if backend() == "cpu":
        assert stats["messages_in_flight"] == stats["pending_receives"] == 0
        assert memory["arena_bytes_in_use"] == 0
        assert memory["arena_bytes_high_water"] < 1 << 20


def settled_stats(group):
    """The mover counts a message a moment after the last rank has it."""
    deadline = time.monotonic() + 5
    while (stats := group.stats())["messages_in_flight"] and time.monotonic() < deadline:
        time.sleep(0.01)
    return stats


@pytest.mark.parametrize("structure", ["unrolled", "scanned"])
def test_replayed_layers_under_chaos(groups, structure):
    """Gradients of rematerialised layers, which XLA may replay side by side, on two lanes."""
    mesh = ep_mesh(as_many(4))
    sizes = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 6, "dtype": jnp.float32}
    group = groups(mesh, **sizes, num_lanes=2)
    problem = make_problem(mesh)
    layer = jax.checkpoint(functools.partial(block, smfree))

    def local(x, *arrays):
        tokens, xs = [group.token(lane) for lane in range(2)], [x, 1 - x]

        def both(carry, _=None):
            results = [layer(token, x, *arrays) for token, x in zip(*carry, strict=True)]
            return [list(part) for part in zip(*results, strict=True)], None

        if structure == "scanned":
            (_, xs), _ = jax.lax.scan(both, [tokens, xs], length=4)
        else:
            for _ in range(4):
                (tokens, xs), _ = both([tokens, xs])
        return jnp.sum(jnp.concatenate(xs) ** 2)[None]

    smap = jax.shard_map(local, mesh=mesh, in_specs=problem.specs, out_specs=problem.rows)
    step = jax.jit(jax.grad(lambda *arrays: jnp.sum(smap(*arrays)), argnums=(0, 2, 3)))
    expected = jax.tree.map(np.asarray, step(*problem.arrays))
    for seed in range(20):
        with chaos_on_cpu(group, seed=seed, max_delay_us=500, stall_probability=1e-3, stall_ms=2):
            jax.tree.map(np.testing.assert_array_equal, step(*problem.arrays), expected)


LAUNCHES = 10


def many_at_once(cache):
    """For another process: 24 operations that do not depend on one another, and their psums."""
    jax.config.update("jax_compilation_cache_dir", cache)
    exchange = SelfChecking(ranks=32, tokens=2, hidden=512, lanes=24)
    mesh = ep_mesh(exchange.ranks)
    group = smfree.EpGroup.create(mesh, config=exchange.config())

    def local(first):
        total = 0
        for lane in range(exchange.lanes):
            _, _, wrong = exchange.wrong_results(group.token(lane), first + lane)
            total += jax.lax.psum(wrong, "ep")
        return total[None]

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P()))
    with group:
        for i in range(LAUNCHES):
            assert int(step(jnp.int32(i * exchange.lanes))[0]) == 0
            print("launch", i, flush=True)
        group.check()


@pytest.mark.cpu_only
def test_24_operations_at_once_on_32_devices(tmp_path):
    """With two cores XLA has fewer threads than there are receives, so none of them may block."""
    for attempt in range(3):
        result = launch(
            many_at_once,
            args=[str(tmp_path / "cache")],
            processes=1,
            devices_per_process=32,
            timeout_s=180,
            log_dir=tmp_path / str(attempt),
        ).check()
        assert result.processes[0].text.count("launch ") == LAUNCHES
