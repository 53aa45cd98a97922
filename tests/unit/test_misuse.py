# SPDX-License-Identifier: Apache-2.0
"""Misuse ends in an error while tracing that says got, expected, where and cure."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from support import as_many, devices, ep_mesh, make_problem

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}


@pytest.fixture
def trace(groups):
    """Traces ``body(group, x, idx, weights)`` in a shard_map over some ranks."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG, num_lanes=2)
    problem = make_problem(mesh)

    def run(body, **kwargs):
        smap = jax.shard_map(
            functools.partial(body, group), mesh=mesh, in_specs=problem.specs[:3],
            out_specs=P("ep"), **kwargs,
        )  # fmt: skip
        jax.eval_shape(smap, *problem.arrays[:3])

    return run


def sent(group, x, idx, weights):
    return smfree.dispatch_send(group.token(), x, idx, weights)


def dispatched(group, x, idx, weights):
    return smfree.dispatch(group.token(), x, idx, weights)


MISUSES = {
    "send in flight": (
        lambda g, *a: smfree.dispatch_send(sent(g, *a), *a),
        ValueError, r"in flight: dispatch_send at test_misuse\.py:\d+ in sent.*dispatch_recv first",
    ),
    "combine_send in flight": (
        lambda g, *a: smfree.combine_send(sent(g, *a), None, a[0]),
        ValueError, "expected one that is ready",
    ),
    "recv ready": (
        lambda g, *a: smfree.dispatch_recv(g.token()),
        ValueError, "a token that is ready, expected one that dispatch_send returned",
    ),
    "recv of the other": (
        lambda g, *a: smfree.combine_recv(sent(g, *a)),
        ValueError, "expected one that combine_send returned",
    ),
    "no token": (lambda g, *a: smfree.dispatch_send(None, *a), TypeError, r"group\.token\(\)"),
    "lane": (lambda g, *a: g.token(2), ValueError, "expected 0 to 1"),
    "overlap nothing": (
        lambda g, *a: smfree.overlap(g.token(), jnp.sin, a[0]), ValueError, "no token in flight",
    ),
    "x rank": (lambda g, x, i, w: sent(g, x[None], i, w), ValueError, r"expected \[T, H\]"),
    "x hidden": (lambda g, x, i, w: sent(g, x[:, :8], i, w), ValueError, r"x\[6, 8\].*\[6, 16\]"),
    "x dtype": (
        lambda g, x, i, w: sent(g, x.astype(jnp.bfloat16), i, w),
        TypeError, r"bfloat16, expected float32.*astype",
    ),
    "too many rows": (
        lambda g, x, i, w: sent(g, jnp.tile(x, (2, 1)), i, w), ValueError, "max_tokens = 8",
    ),
    "idx shape": (lambda g, x, i, w: sent(g, x, i[:, :1], w), ValueError, r"topk_idx\[6, 1\]"),
    "idx dtype": (
        lambda g, x, i, w: sent(g, x, i.astype(jnp.int16), w), TypeError, "expected int32",
    ),
    "weights dtype": (
        lambda g, x, i, w: sent(g, x, i, w.astype(jnp.bfloat16)), TypeError, "expected float32",
    ),
    "y shape": (
        lambda g, *a: (lambda d, t: smfree.combine_send(t, d, d.x[:-1]))(*dispatched(g, *a)),
        ValueError, r"as d\.x",
    ),
    "combine weights": (
        lambda g, *a: (lambda d, t: smfree.combine_send(t, d, d.x, a[2]))(*dispatched(g, *a)),
        ValueError, r"weights\[6, 2\], expected \[N\]",
    ),
    "no result": (
        lambda g, *a: smfree.combine_send(dispatched(g, *a)[1], a[0], a[0]),
        TypeError, "DispatchResult",
    ),
}  # fmt: skip


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", MISUSES)
def test_misuse(trace, name, check_vma):
    body, error, match = MISUSES[name]
    with pytest.raises(error, match=match):
        trace(body, check_vma=check_vma)


def test_outside_of_shard_map(groups):
    group = groups(ep_mesh(as_many(4)), **CONFIG)
    x = jnp.zeros((8, 16))
    with pytest.raises(ValueError, match="no shard_map"):
        smfree.dispatch_send(group.token(), x, jnp.zeros((8, 2), jnp.int32))


def test_axis_not_manual(groups):
    mesh = Mesh(devices(as_many(8, at_least=2)).reshape(2, -1), ("data", "ep"))
    group = groups(mesh, **CONFIG)

    @functools.partial(
        jax.shard_map, mesh=mesh, axis_names={"ep"}, in_specs=P("ep"), out_specs=P("ep")
    )
    def body(x):
        return smfree.dispatch(group.token(), x, jnp.zeros((8, 2), jnp.int32))[0].x

    with pytest.raises(ValueError, match=r"axes \['data'\] manual"):
        jax.jit(body)(jnp.zeros((8 * mesh.shape["ep"], 16)))


def test_closed_group_while_tracing_and_after(groups):
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=problem.specs[:3], out_specs=problem.rows)
    def step(x, idx, weights):
        d, token = smfree.dispatch(group.token(), x, idx, weights)
        return smfree.combine(token, d, d.x)[0]

    jax.block_until_ready(step(*problem.arrays[:3]))
    group.close()
    group.close()
    assert group.closed
    with pytest.raises(Exception, match="EpGroup of this program is closed"):
        jax.block_until_ready(step(*problem.arrays[:3]))
    with pytest.raises(ValueError, match="closed"):
        group.token()


def test_a_group_is_a_context_manager():
    config = smfree.EpConfig(**CONFIG)
    ranks = as_many(2)
    with smfree.EpGroup.create(ep_mesh(ranks), config=config) as group:
        assert not group.closed
        assert f"num_ranks={ranks}" in repr(group)
    assert group.closed


def test_typestate_crosses_jit_and_scan(groups):
    """State, lane and group are static data of the pytree: a wrong one is another type."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)

    def body(x, idx, weights):
        def step(token, _):
            return smfree.dispatch_send(token, x, idx, weights), None

        return jax.lax.scan(step, group.token(), length=2)[0].array

    smap = jax.shard_map(body, mesh=mesh, in_specs=problem.specs[:3], out_specs=P("ep"))
    with pytest.raises(TypeError, match="carry"):
        jax.eval_shape(smap, *problem.arrays[:3])


@pytest.mark.cpu_only
def test_handle_of_a_group_in_the_other_mode(groups):
    mesh = ep_mesh(4)
    direct, hierarchical = groups(mesh, **CONFIG), groups(mesh, **CONFIG, ranks_per_node=2)
    problem = make_problem(mesh)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=problem.specs[:3], out_specs=problem.rows)
    def step(x, idx, weights):
        d, _ = smfree.dispatch(direct.token(), x, idx, weights)
        return smfree.combine(hierarchical.token(), d, d.x)[0]

    with pytest.raises(ValueError, match=r"another group.*mode='direct' instead of 'hier"):
        jax.eval_shape(step, *problem.arrays[:3])
