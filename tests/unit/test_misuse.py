# SPDX-License-Identifier: Apache-2.0
"""Misuse ends in an error while tracing that says got, expected, where and cure."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from support import as_many, devices, ep_mesh, make_problem, portable_too

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


FP8 = smfree.Fp8(block=32)


def wide(x):
    """Rows of 32 numbers; 16 of the float32 ones are the longest."""
    return jnp.tile(x, (1, 2)).astype(jnp.bfloat16)


def dispatched(group, x, idx, weights):
    return smfree.dispatch(group.token(), x, idx, weights)


def cast(tree, of=jnp.float32):
    """What a ``jax.tree.map`` over the parameters does that meets a token by mistake."""
    return jax.tree.map(lambda v: v.astype(jnp.bfloat16) if v.dtype == of else v, tree)


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
    "x rank": (
        lambda g, x, i, w: sent(g, x[None], i, w),
        ValueError, r"x\[1, 6, 16\], whose rows take 384 bytes.*at most 64, .*Reshape x\[B, T, H\]",
    ),
    "x scalar": (
        lambda g, x, i, w: sent(g, x[0, 0], i, w),
        ValueError, r"x\[\], expected an array \[T, \.\.\.\]",
    ),
    "x hidden": (
        lambda g, x, i, w: sent(g, jnp.tile(x, (1, 2)), i, w),
        ValueError, r"x\[6, 32\], whose rows take 128 bytes each on the wire, expected at most 64",
    ),
    "x empty rows": (lambda g, x, i, w: sent(g, x[:, :0], i, w), ValueError, "one element or more"),
    "x list": (lambda g, x, i, w: sent(g, [[1.0]], i, w), TypeError, r"1\.0 as x\[0\]\[0\]"),
    "x nothing": (lambda g, x, i, w: sent(g, {}, i, w), ValueError, "x of 0 arrays, expected 1 to"),
    "x many": (
        lambda g, x, i, w: sent(g, [x[:, :1]] * 9, i, w),
        ValueError, "x of 9 arrays, expected 1 to 8. Concatenate",
    ),
    "x dtype": (
        lambda g, x, i, w: sent(g, x.astype(jnp.complex64), i, w),
        TypeError, r"x of complex64, expected one of float32, bfloat16.*astype",
    ),
    "x rows": (
        lambda g, x, i, w: sent(g, {"a": x[:, :4], "b": x[:5, :4]}, i, w),
        ValueError, r"x\['b'\] with 5 rows, expected 6",
    ),
    "x blocks": (
        lambda g, x, i, w: smfree.dispatch_send(g.token(), x[:, :8], i, w, wire=FP8),
        ValueError, r"x with 8 elements in a row and wire=Fp8.*multiple of the block of 32",
    ),
    "x gradient blocks": (
        lambda g, x, i, w: smfree.dispatch_send(g.token(), x[:, :8], i, w, grad_wire=FP8),
        ValueError, r"grad_wire=Fp8.*or grad_wire=None",
    ),
    "wire": (
        lambda g, *a: smfree.dispatch_send(g.token(), *a, wire=jnp.float8_e4m3fn),
        TypeError, "as wire, expected a Fp8. Or None",
    ),
    "keep without wire": (
        lambda g, *a: smfree.dispatch_send(g.token(), *a, keep=True),
        ValueError, r"keep=True without wire, expected wire=smfree\.Fp8",
    ),
    "keep differentiated": (
        lambda g, x, i, w: jax.grad(
            lambda x: smfree.dispatch(g.token(), wide(x), i, w, wire=FP8, keep=True)[0].weights[0]
        )(x),
        ValueError, r"test_misuse\.py.* differentiated in x, but has keep=True.*stop_gradient",
    ),
    "gradients do not fit": (
        lambda g, x, i, w: jax.grad(
            lambda x: jnp.sum(
                smfree.dispatch(g.token(), jnp.tile(x, (1, 2)), i, w, wire=FP8)[0].x
            )
        )(x),
        ValueError, "gradients take 128 bytes for each row.*at most 64.*or set grad_wire",
    ),
    "transposed dispatch": (
        lambda g, x, i, w: jax.linear_transpose(
            lambda x: smfree.dispatch(g.token(), x, i)[0].x, x
        )(dispatched(g, x, i, w)[0].x),
        ValueError, r"test_misuse\.py.*transposed as it stands.*jax\.vjp",
    ),
    "transposed with its dispatch": (
        lambda g, x, i, w: jax.linear_transpose(
            lambda x: (lambda d, t: smfree.combine(t, d, d.x, None)[0])(*dispatched(g, x, i, w)), x
        )(x),
        ValueError, r"test_misuse\.py.*transposed as it stands.*jax\.vjp",
    ),
    "neither index nor routing": (
        lambda g, x, i, w: smfree.dispatch_send(g.token(), x),
        ValueError, "neither topk_idx and routing, expected one of them",
    ),
    "index and routing": (
        lambda g, x, i, w: (lambda d, t: smfree.dispatch_send(t, x, i, routing=d.handle))(
            *dispatched(g, x, i, w)
        ),
        ValueError, "both topk_idx and routing",
    ),
    "no routing": (
        lambda g, x, i, w: (lambda d, t: smfree.dispatch_send(t, x, routing=d))(
            *dispatched(g, x, i, w)
        ),
        TypeError, r"a DispatchResult as routing, expected the handle of a dispatch, d\.handle",
    ),
    "rows of a routing": (
        lambda g, x, i, w: (lambda d, t: smfree.dispatch_send(t, x[:5], routing=d.handle))(
            *dispatched(g, x, i, w)
        ),
        ValueError, "x with 5 rows, expected 6, as the dispatch that made the routing",
    ),
    "capacity along a routing": (
        lambda g, x, i, w: (
            lambda d, t: smfree.dispatch(t, x, routing=d.handle, capacity=3)
        )(*dispatched(g, x, i, w)),
        ValueError, "capacity for a dispatch along a handle, expected None",
    ),
    "capacity": (
        lambda g, *a: smfree.dispatch_recv(sent(g, *a), capacity=-1),
        ValueError, "capacity=-1, expected 0 to",
    ),
    "capacity array": (
        lambda g, *a: smfree.dispatch_recv(sent(g, *a), capacity=a[2][0]),
        TypeError, r"capacity float32\[2\], expected an int32 scalar",
    ),
    "y dtype": (
        lambda g, *a: (lambda d, t: smfree.combine_send(t, d, d.x.astype(jnp.int32)))(
            *dispatched(g, *a)
        ),
        TypeError, r"y of int32, expected one of float32, .*carried by a dispatch, but not summed",
    ),
    "y hidden": (
        lambda g, *a: (lambda d, t: smfree.combine_send(t, d, jnp.tile(d.x, (1, 2))))(
            *dispatched(g, *a)
        ),
        ValueError, r"y\[.*, 32\], whose rows take 128 bytes",
    ),
    "add structure": (
        lambda g, *a: (lambda t: smfree.combine_recv(t, add={"y": a[0]}))(
            (lambda d, t: smfree.combine_send(t, d, d.x))(*dispatched(g, *a))
        ),
        ValueError, "add of the structure .*expected that of y",
    ),
    "add shape": (
        lambda g, *a: (lambda t: smfree.combine_recv(t, add=a[0][:, :8]))(
            (lambda d, t: smfree.combine_send(t, d, d.x))(*dispatched(g, *a))
        ),
        ValueError, r"add\[6, 8\], expected .*\[6, 16\]",
    ),
    "add dtype": (
        lambda g, *a: (lambda t: smfree.combine_recv(t, add=a[0].astype(jnp.bfloat16)))(
            (lambda d, t: smfree.combine_send(t, d, d.x))(*dispatched(g, *a))
        ),
        TypeError, "add of bfloat16, expected float32",
    ),
    "too many rows": (
        lambda g, x, i, w: sent(g, jnp.tile(x, (2, 1)), i, w), ValueError,
        r"num_ranks = \d.*max_tokens = 8",
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
    "token cast": (
        lambda g, *a: smfree.dispatch_send(cast(g.token()), *a), TypeError,
        r"token with an array of bfloat16 that was of float32: it was cast.*jax\.tree\.map",
    ),
    "token in flight cast": (
        lambda g, *a: smfree.dispatch_recv(cast(sent(g, *a), jnp.int32)),
        TypeError, r"array of bfloat16 that was of int32",
    ),
    "result cast": (
        lambda g, *a: (lambda d, t: smfree.combine_send(t, cast(d, jnp.int32), d.x))(
            *dispatched(g, *a)
        ),
        ValueError, r"d\.handle\.places of bfloat16\[6, .\], expected int32\[6, .\].*tree\.map",
    ),
    "received twice": (
        lambda g, *a: (lambda t: (smfree.dispatch_recv(t), smfree.dispatch_recv(t)))(sent(g, *a)),
        ValueError, r"in flight: dispatch_send at .*received already.*first recv returned",
    ),
    "combine received twice": (
        lambda g, *a: (lambda t: (smfree.combine_recv(t), smfree.combine_recv(t)))(
            (lambda d, t: smfree.combine_send(t, d, d.x))(*dispatched(g, *a))
        ),
        ValueError, "combine_recv: .*received already",
    ),
    "fewer rows": (
        lambda g, *a: (lambda d, t: smfree.combine_send(t, d.replace(x=d.x[:7]), d.x[:7]))(
            *dispatched(g, *a)
        ),
        ValueError, r"d\.x\[7, 16\], expected the \d+ rows .*weights to zero",
    ),
    "no result": (
        lambda g, *a: smfree.combine_send(dispatched(g, *a)[1], a[0], a[0]),
        TypeError, "DispatchResult",
    ),
}  # fmt: skip


@portable_too
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


@portable_too
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
    states = r"carry.*EpGroup\(axis='ep', num_ranks=.*\), 0, InFlight"
    with pytest.raises(TypeError, match=states) as caught:
        jax.eval_shape(smap, *problem.arrays[:3])
    assert "EpConfig" not in str(caught.value), "too much to see the difference"


def test_a_function_that_is_traced_twice_receives_twice(groups):
    """So do both branches of a ``cond``: no misuse."""
    mesh = ep_mesh(as_many(4))
    group, problem = groups(mesh, **CONFIG), make_problem(mesh)

    def body(x, idx, weights):
        token = sent(group, x, idx, weights)

        def receive():
            return smfree.dispatch_recv(token)[0].x

        jax.eval_shape(receive)
        everywhere = jax.lax.psum(x[0, 0], "ep") > 0
        return jax.lax.cond(everywhere, receive, lambda: -receive())

    smap = jax.shard_map(body, mesh=mesh, in_specs=problem.specs[:3], out_specs=P("ep"))
    jax.block_until_ready(jax.jit(smap)(*problem.arrays[:3]))
