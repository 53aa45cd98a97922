# SPDX-License-Identifier: Apache-2.0
"""More rows than fit on the wire or into ``d.x``: an error that is told once, or a count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
import oracle
from faults.running import CONFIG, assert_told, run
from support import ep_mesh, make_problem, portable_too, x64

RANKS = 4
CAPACITY = 15
ROWS = 6


def dispatch_and_combine(token, *arrays):
    d, token = smfree.dispatch(token, *arrays)
    out, _ = smfree.combine(token, d, jnp.ones_like(d.x))
    return jax.tree.map(lambda a: a[None], (d.x, d.weights, d.num_dropped[0], out))


def problem_with_overflow_on(rank):
    """Every row goes to the first expert of ``rank``, and of the one after it."""
    problem = make_problem(ep_mesh(RANKS), tokens=ROWS)
    to = np.array([2 * rank, 2 * (rank + 1) % 8], np.int32)
    idx = np.broadcast_to(to, problem.topk_idx.shape).copy()
    idx[: 2 * ROWS, 1] = -1  # half of them to the second one: they fit
    return type(problem)(problem.mesh, problem.x, jnp.asarray(idx), *problem.arrays[2:])


@portable_too
@pytest.mark.parametrize(
    ("capacities", "said", "words"),
    [
        (
            {"recv_capacity": CAPACITY, "wire_capacity": RANKS * ROWS},
            rf"{RANKS * ROWS - CAPACITY} rows exceed recv_capacity {CAPACITY}; ",
            "Fix: raise recv_capacity",
        ),
        (
            {"wire_capacity": CAPACITY},
            rf"{RANKS * ROWS} rows came here and exceed wire_capacity {CAPACITY}; ",
            "Fix: raise wire_capacity",
        ),
        (
            {"recv_capacity": CAPACITY},
            rf"exceed wire_capacity {CAPACITY}, which follows recv_capacity; ",
            "Fix: raise recv_capacity",
        ),
    ],
    ids=("recv", "wire", "wire follows recv"),
)
def test_error(groups, capacities, said, words):
    """NaN on that rank and in what depends on it, exact rows elsewhere; then all is well again."""
    group = groups(ep_mesh(RANKS), **CONFIG, **capacities)
    outcome = run(group, dispatch_and_combine, problem_with_overflow_on(rank=1))
    assert outcome.errors == [None] * RANKS  # the program runs to its end
    x, weights, num_dropped, out = map(np.asarray, outcome.out)
    np.testing.assert_array_equal(num_dropped, [0, RANKS * ROWS - CAPACITY, 0, 0])
    assert np.isnan(x[1]).all() and np.isnan(weights[1]).all()
    others = [0, 2, 3]
    assert np.isfinite(x[others]).all() and np.isfinite(weights[others]).all()
    assert np.isnan(out).all()  # the copies on rank 1 were kept, and poisoned; or lost

    where = (r"rank 1 in dispatch_recv \(", r"test_capacity\.py:\d+ in dispatch_and_combine")
    assert_told(group, ".*".join((*where, said, words)), (*where, said, words))
    group.check()

    fits = run(
        group, dispatch_and_combine, make_problem(group.mesh, tokens=ROWS, none_fraction=0.5)
    )
    assert np.isfinite(jax.tree.leaves(fits.out)[0]).all()
    assert not np.any(fits.out[2])
    group.check()
    assert group.stats()["rows_dropped"] == RANKS * ROWS - CAPACITY


@portable_too
@pytest.mark.parametrize(
    ("capacities", "of_call", "room", "said"),
    [
        ({"recv_capacity": 14}, None, 7, "recv_capacity 14, 7 for each local expert; "),
        ({"recv_capacity": 14}, 5, 5, "capacity 5 of this call; "),
        ({}, 5, 5, "capacity 5 of this call; "),
    ],
    ids=("recv", "call", "call of the worst case"),
)
@pytest.mark.parametrize("overflow", ["error", "drop"])
def test_of_padded_groups(groups, capacities, of_call, room, said, overflow):
    """An expert that got too much takes nothing from the other one; the error names it.

    Of the 12 rows all go to expert 2, and the last 3 to expert 3; both are of rank 1.
    """
    sizes = {"num_experts": 8, "top_k": 2, "hidden": 8, "max_tokens": 3, "dtype": jnp.float32}
    more = {"layout": "padded", "overflow": overflow, "wire_capacity": 12}
    group = groups(ep_mesh(RANKS), **sizes, **capacities, **more)
    idx = np.full((12, 2), [2, -1], np.int32)
    idx[9:, 1] = 3

    def local(x, idx):
        capacity = None if of_call is None else jnp.int32(of_call)
        d, token = smfree.dispatch(group.token(), {"x": x, "i": idx}, idx, capacity=capacity)
        return d, smfree.combine(token, d, 1 + d.x["x"], None)[0]

    smap = jax.shard_map(local, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep"))
    d, out = jax.tree.map(np.asarray, jax.jit(smap)(np.arange(12.0)[:, None], idx))
    lost = 12 - room
    assert d.num_dropped.tolist() == [0, lost, 0, 0]
    assert d.num_rows.tolist() == d.group_sizes.tolist() == [0, 0, room, 3, 0, 0, 0, 0]
    assert d.x["x"].shape == (8, d.weights.shape[1], 1)
    if overflow == "drop":
        assert d.x["x"][2, :room, 0].tolist() == list(range(room))
        assert d.x["x"][3, :3, 0].tolist() == [9, 10, 11]
        of_2 = np.where(np.arange(12) < room, 1.0 + np.arange(12), 0)
        of_3 = np.where(np.arange(12) < 9, 0, 1.0 + np.arange(12))
        np.testing.assert_array_equal(out[:, 0], of_2 + of_3)
    else:
        assert np.isnan(d.x["x"][2:4]).all() and np.isnan(d.weights[2:4]).all()
        assert (d.x["i"][2:4] == -1).all() and np.isnan(out).all()
        where = r"rank 1 in dispatch_recv \("
        words = f"{lost} rows exceed {said}the busiest, expert 2, got 12; "
        assert_told(group, f"{where}.*{words}", (where, words, "Fix: raise .*capacity"))
    group.check()


def test_error_on_two_ranks_is_one_error(groups):
    """The first one is told; the next overflow is told again."""
    group = groups(ep_mesh(RANKS), **CONFIG, recv_capacity=ROWS)
    for _ in range(2):
        outcome = run(group, dispatch_and_combine, problem_with_overflow_on(rank=1))
        assert np.sum(np.asarray(outcome.out[2]) > 0) == 2
        with pytest.raises(smfree.SmfreeError, match=r"rank [12] in dispatch_recv"):
            group.check()
        group.check()


@portable_too
@pytest.mark.parametrize(
    "ranks_per_node", [None, pytest.param(2, marks=pytest.mark.cpu_only)], ids=str
)
def test_drop_by_hand(groups, ranks_per_node):
    """Row t of rank r is 10 r + t, and all go to rank 0: the wire takes 8, d.x the first 7."""
    sizes = {"num_experts": 4, "top_k": 1, "hidden": 1, "max_tokens": 3, "dtype": jnp.float32}
    capacities = {"wire_capacity": 8, "recv_capacity": 7, "overflow": "drop"}
    group = groups(ep_mesh(RANKS), **sizes, **capacities, ranks_per_node=ranks_per_node)
    x = jnp.array([[0.0], [1], [2], [10], [11], [12], [20], [21], [22], [30], [31], [32]])
    idx = jnp.zeros((12, 1), jnp.int32)

    def local(x, idx):
        d, token = smfree.dispatch(group.token(), x, idx)
        out, _ = smfree.combine(token, d, 2 * d.x)
        return out, d

    smap = jax.shard_map(local, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep"))

    def loss(x):
        out, d = smap(x, idx)
        return jnp.sum(out), (out, d)

    gradient, (out, d) = jax.jit(jax.grad(loss, has_aux=True))(x)

    assert d.handle.send_counts.tolist() == [3, 0, 0, 0] * 4
    assert d.handle.recv_counts.tolist() == [3, 3, 2, 0] + [0] * 12
    assert d.handle.rows[:8, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
    assert d.x[:7, 0].tolist() == [0, 1, 2, 10, 11, 12, 20]
    assert d.num_dropped.tolist() == [4 + 1, 0, 0, 0]
    assert out[:, 0].tolist() == [0, 2, 4, 20, 22, 24, 40, 0, 0, 0, 0, 0]
    assert gradient[:, 0].tolist() == [2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0]


@portable_too
def test_drop(groups):
    """The last rows go first, are counted, and nothing is said."""
    group = groups(ep_mesh(RANKS), **CONFIG, recv_capacity=CAPACITY, overflow="drop")
    problem = problem_with_overflow_on(rank=1)
    for calls in range(1, 3):
        outcome = run(group, dispatch_and_combine, problem)
        assert outcome.errors == [None] * RANKS
        group.check()
        assert group.stats()["rows_dropped"] == calls * (RANKS * ROWS - CAPACITY)
    x, weights, num_dropped, out = map(np.asarray, outcome.out)
    sent, idx, topk_weights = (np.asarray(a).reshape(RANKS, ROWS, -1) for a in problem.arrays[:3])
    routing = oracle.route(idx, 8, recv_capacity=CAPACITY)
    rows, row_weights = oracle.dispatch(routing, sent, topk_weights)
    np.testing.assert_array_equal(x, rows)
    np.testing.assert_array_equal(weights, row_weights)
    np.testing.assert_array_equal(num_dropped, routing.num_dropped)
    expected = oracle.combine(routing, np.ones_like(x), weights)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@portable_too
@pytest.mark.parametrize("layout", ["grouped", "padded"])
def test_a_call_without_room(groups, layout):
    """The error names the capacity of the call, though 0 is what a group without one has."""
    group = groups(ep_mesh(RANKS), **CONFIG, layout=layout)

    def local(x, idx, weights):
        d, token = smfree.dispatch(group.token(), x, idx, weights, capacity=0)
        return d.num_rows, smfree.combine(token, d, d.x)[0]

    problem = problem_with_overflow_on(rank=1)
    smap = jax.shard_map(local, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep"))
    num_rows, out = jax.jit(smap)(*problem.arrays[:3])
    assert not num_rows.any() and np.isnan(out).all()
    words = ("rows exceed capacity 0 of this call", "Fix: raise capacity")
    assert_told(group, r"rank [12] in dispatch_recv \(", words)


@portable_too
@pytest.mark.parametrize("capacity", [2**32 - 1, 2**40, -(2**40)])
def test_a_capacity_of_more_than_32_bits(groups, capacity):
    """It is as much as there are rows, or nothing, and not what its lower bits say."""
    group = groups(ep_mesh(RANKS), **CONFIG, overflow="drop")

    def local(x, idx, weights):
        given = jnp.asarray(capacity, jnp.uint32 if capacity == 2**32 - 1 else jnp.int64)
        return smfree.dispatch(group.token(), x, idx, weights, capacity=given)[0].num_rows

    problem = problem_with_overflow_on(rank=1)
    smap = jax.shard_map(local, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep"))
    with x64():
        num_rows = jax.jit(smap)(*problem.arrays[:3])
    copies = int((np.asarray(problem.topk_idx) >= 0).sum())
    assert num_rows.sum() == (copies if capacity > 0 else 0)


@portable_too
@pytest.mark.parametrize("overflow", ["error", "drop"])
@pytest.mark.parametrize("wire", [None, smfree.Fp8(block=32)], ids=["plain", "wire"])
@pytest.mark.parametrize(
    ("capacities", "of_call"),
    [
        ({"wire_capacity": 7}, None),
        ({"wire_capacity": 12, "recv_capacity": 7}, None),
        ({}, 7),
    ],
    ids=("wire", "recv", "call"),
)
@pytest.mark.parametrize(
    "ranks_per_node", [None, pytest.param(2, marks=pytest.mark.cpu_only)], ids=str
)
def test_what_is_lost(groups, capacities, of_call, wire, overflow, ranks_per_node):
    """All rows but the last go to rank 0, which has room for 7, and one to its own rank.

    A lost row is NaN where it is missed; or it adds nothing. Of what arrives on a rank that has no
    room nothing is right; integers have all bits set.
    """
    sizes = {"num_experts": 4, "top_k": 2, "hidden": 64, "max_tokens": 3, "dtype": jnp.float32}
    group = groups(
        ep_mesh(RANKS), **sizes, **capacities, overflow=overflow, ranks_per_node=ranks_per_node
    )
    own = np.repeat(np.arange(4, dtype=np.int32), 3)
    idx = np.stack([np.zeros_like(own), np.where(own == 0, -1, own)], axis=1)
    idx[-1] = -1

    def local(x, idx):
        rows = {"x": x, "i": idx, "u": idx.astype(jnp.uint8), "b": idx > 0}
        capacity = None if of_call is None else jnp.int32(of_call)
        d, token = smfree.dispatch(group.token(), rows, idx, capacity=capacity, wire=wire)
        ones = {"y": jnp.ones_like(d.x["x"]), "z": jnp.ones(d.weights.shape, jnp.bfloat16)}
        add = {"y": jnp.full_like(x, -0.0), "z": jnp.full(len(x), 2, jnp.bfloat16)}
        wire_back = smfree.Fp8(block=32) if wire else None
        out, _ = smfree.combine(
            token, d, {"y": ones["y"]}, None, wire=wire_back, add={"y": add["y"]}
        )
        narrow, _ = smfree.combine(group.token(), d, ones["z"], None, add=add["z"])
        return d, out["y"], narrow

    smap = jax.shard_map(local, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep"))
    d, out, narrow = jax.tree.map(np.asarray, jax.jit(smap)(jnp.ones((12, 32)), idx))
    assert d.num_dropped.tolist() == [4, 0, 0, 0]
    assert d.num_rows.tolist() == [7, 3, 3, 2] and d.group_sizes.tolist() == [7, 3, 3, 2]
    lost = np.nan if overflow == "error" else 1
    expected = np.array([1, 1, 1, 2, 2, 2, 2, lost, lost, lost, lost, 0], np.float32)
    np.testing.assert_array_equal(out, np.broadcast_to(expected[:, None], out.shape))
    assert np.signbit(out[-1]).all(), "a row without experts is what is added"
    np.testing.assert_array_equal(narrow.astype(np.float32), expected + 2)

    n = len(d.weights) // RANKS
    first, second = ({k: v[at : at + 2] for k, v in d.x.items()} for at in (0, n))
    if overflow == "error":
        assert np.isnan(first["x"]).all() and np.isnan(d.weights[:n]).all()
        assert (first["i"] == -1).all() and (first["u"] == 255).all() and first["b"].all()
        assert_told(group, r"rank 0 in dispatch_recv \(", ["exceed .*capacity 7"])
    else:
        assert (first["i"] == [0, -1]).all() and (first["x"] == 1).all()
    assert (second["i"] == [0, 1]).all() and (second["x"] == 1).all()
    group.check()
