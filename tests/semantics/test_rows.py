# SPDX-License-Identifier: Apache-2.0
"""Rows of several arrays, of other widths and dtypes, quantised: under every transformation."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree._src import reference
from support import (
    IN_NODES,
    PORTABLE,
    as_many,
    assert_trees_close,
    ep_mesh,
    make_problem,
    portable_too,
    reference_of,
)

HIDDEN = 32
CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 96, "max_tokens": 8, "dtype": jnp.float32}
WIRE = smfree.Fp8(block=32)
GRAD_WIRE = smfree.Fp8(block=32, dtype=jnp.float8_e5m2)
FLOAT0 = jax.dtypes.float0


def layer(ops, token, x, idx, weights, kernel, *, wire=None, grad_wire=None):
    """Uses all that an operation can carry; -> token, x of the same shape."""
    how = {"wire": wire, "grad_wire": grad_wire}
    number = jnp.arange(x.shape[0], dtype=jnp.int32)
    rows = {"x": x, "number": number, "half": x.astype(jnp.bfloat16).reshape(-1, 2, HIDDEN // 2)}
    token = ops.dispatch_send(token, rows, idx, weights, **how)
    token, shared = ops.overlap(token, lambda x, w: jnp.tanh(x @ w), x, kernel)
    d, token = ops.dispatch_recv(token, capacity=d_capacity(x))
    token = ops.dispatch_send(token, jnp.sin(x), routing=d.handle, **how)
    more, token = ops.dispatch_recv(token)
    token = ops.dispatch_send(token, number, routing=d.handle)  # nothing of it is differentiated
    again, token = ops.dispatch_recv(token)

    scale = (1 + d.local_expert + d.x["number"] + again.x)[:, None].astype(jnp.float32)
    both = d.x["x"] + d.x["half"].reshape(-1, HIDDEN).astype(jnp.float32)
    y = (both + more.x) @ kernel * more.weights[:, None]
    results = {"wide": y, "narrow": jnp.tanh(y[:, :HIDDEN] / scale).astype(jnp.bfloat16)}
    token = ops.combine_send(token, d, results, **how)
    add = {"wide": shared, "narrow": jnp.zeros_like(shared, jnp.bfloat16)}
    out, token = ops.combine_recv(token, add=add)
    return token, out["wide"] + out["narrow"].astype(jnp.float32)


def d_capacity(x):
    """A number that is known when the program runs; more than there are rows."""
    return jnp.int32(1000) + jnp.sum(x).astype(jnp.int32) * 0


def plain(layer):
    return layer


MODES = {
    "plain": plain,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "save_comm": functools.partial(jax.checkpoint, policy=smfree.save_comm_policy),
}


def loop(layer, *carry):
    for _ in range(2):
        carry = layer(*carry)
    return carry


def scan(layer, *carry):
    return jax.lax.scan(lambda carry, _: (layer(*carry), None), carry, length=2)[0]


STRUCTURES = {"loop": loop, "scan": scan}


def value_and_grads(ops, start, problem, structure, mode, **how):
    def local(x, idx, weights, kernel):
        def one(token, x):
            return layer(ops, token, x, idx, weights, kernel, **how)

        out = STRUCTURES[structure](MODES[mode](one), start(), x)[1]
        return jnp.sum(out**2)[None]

    sharded = jax.shard_map(local, mesh=problem.mesh, in_specs=problem.specs, out_specs=P("ep"))

    def loss(*arrays):
        return jnp.sum(sharded(*arrays))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3)))(*problem.arrays)


@functools.cache
def expected(structure):
    problem = make_problem(ep_mesh(as_many(4)), hidden=HIDDEN)
    group = reference.Group("ep", smfree.EpConfig(**CONFIG))
    return value_and_grads(reference, group.token, problem, structure, "plain")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("structure", STRUCTURES)
@portable_too
def test_gradients(groups, structure, mode):
    """bfloat16 is rounded where the reference rounds it, but for sums over ranks."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, hidden=HIDDEN)
    actual = value_and_grads(smfree, group.token, problem, structure, mode)
    assert_trees_close(actual, expected(structure), tolerance=2e-3)


@pytest.mark.parametrize(
    ("groups", "wire", "grad_wire"),
    [
        pytest.param({}, WIRE, None, id="wire"),
        pytest.param({}, None, GRAD_WIRE, id="grad_wire"),
        pytest.param({}, WIRE, WIRE, id="both"),
        pytest.param(PORTABLE, WIRE, GRAD_WIRE, id="portable"),
        pytest.param(IN_NODES, WIRE, None, id="nodes", marks=pytest.mark.cpu_only),
    ],
    indirect=["groups"],
)
def test_quantised_on_the_wire(groups, wire, grad_wire):
    """Straight-through: the reference's rounding, and its gradients.

    By their norms: what differs in its last bit may be quantised to another value, here and there.
    """
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, hidden=HIDDEN)
    how = {"wire": wire, "grad_wire": grad_wire}

    def run(ops, start, **how):
        return jax.tree.leaves(value_and_grads(ops, start, problem, "loop", "plain", **how))

    actual, expected = (
        run(smfree, group.token, **how),
        run(reference, reference_of(group).token, **how),
    )
    distances = list(map(distance, actual, expected))
    assert max(distances) < 1e-2
    off = map(distance, actual, run(smfree, group.token))
    assert max(off) > 1e-2, "nothing was quantised"


def distance(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@portable_too
def test_wires_of_the_config(groups):
    """They are the dispatches' own, and None turns them off."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG, wire=WIRE, grad_wire=GRAD_WIRE)
    problem = make_problem(mesh, hidden=HIDDEN)

    def run(ops, start, **how):
        def local(x, idx, weights, kernel):
            def received(x):
                token = ops.dispatch_send(start(), x, idx, weights, **how)
                return ops.dispatch_recv(token)[0].x

            rows, pullback = jax.vjp(received, x)
            return rows, pullback(jnp.cos(rows))[0]

        smap = jax.shard_map(local, mesh=mesh, in_specs=problem.specs, out_specs=P("ep"))
        return jax.jit(smap)(*problem.arrays)

    given = run(smfree, group.token, wire=WIRE, grad_wire=GRAD_WIRE)
    jax.tree.map(np.testing.assert_array_equal, run(smfree, group.token), given)
    jax.tree.map(np.testing.assert_array_equal, run(reference, reference_of(group).token), given)
    off = run(smfree, group.token, wire=None, grad_wire=None)
    assert np.abs(off[0] - given[0]).max() > 1e-3


@portable_too
def test_keep(groups):
    """Values and scales are what was quantised, and nothing else differs."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, hidden=HIDDEN)

    def run(ops, start):
        def local(x, idx, weights, kernel):
            rows = {"x": x.reshape(-1, 2, HIDDEN // 2), "id": jnp.arange(x.shape[0])}

            def weighted(weights):
                token = ops.dispatch_send(start(), rows, idx, weights, wire=WIRE, keep=True)
                kept, token = ops.dispatch_recv(token)
                return jnp.sum(kept.weights**2), kept

            gradient, kept = jax.grad(weighted, has_aux=True)(weights)
            token = ops.dispatch_send(start(), rows, idx, weights, wire=WIRE)
            plain, token = ops.dispatch_recv(token)
            return kept.x, plain.x, kept.weights, gradient

        smap = jax.shard_map(local, mesh=mesh, in_specs=problem.specs, out_specs=P("ep"))
        return jax.jit(smap)(*problem.arrays)

    actual = run(smfree, group.token)
    kept, plain = actual[:2]
    values, scales = kept["x"]
    assert (values.dtype, scales.dtype) == (jnp.float8_e4m3fn, jnp.float32)
    assert values.shape == plain["x"].shape and scales.shape == (len(values), 1)
    np.testing.assert_array_equal(values.astype(jnp.float32) * scales[..., None], plain["x"])
    np.testing.assert_array_equal(kept["id"], plain["id"])
    assert_trees_close(actual, run(reference, reference_of(group).token), tolerance=1e-6)


@portable_too
def test_second_order(groups):
    mesh = ep_mesh(as_many(2))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, hidden=HIDDEN)
    x, idx, weights, kernel = problem.arrays

    def derivatives(ops, start):
        def local(x, idx, weights, kernel):
            return jnp.sum(layer(ops, start(), x, idx, weights, kernel)[1] ** 2)[None]

        smap = jax.shard_map(local, mesh=mesh, in_specs=problem.specs, out_specs=P("ep"))
        gradient = jax.grad(lambda x, w: jnp.sum(smap(x, idx, w, kernel)), argnums=(0, 1))
        tangents = (jnp.cos(x), jnp.sin(weights))
        return jax.jit(functools.partial(jax.jvp, gradient))((x, weights), tangents)

    actual = derivatives(smfree, group.token)
    assert_trees_close(actual, derivatives(reference, reference_of(group).token), tolerance=5e-3)


def test_what_has_no_gradient_is_not_sent(groups):
    """Integers alone have no tangent: their operations send nothing in the backward pass."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, hidden=HIDDEN)

    def local(x, idx, weights, kernel):
        d, token = smfree.dispatch(group.token(), x, idx, weights)
        ids, token = smfree.dispatch(token, jnp.arange(x.shape[0]), routing=d.handle)
        return smfree.combine(token, d, d.x * ids.x[:, None])[0]

    smap = jax.shard_map(local, mesh=mesh, in_specs=problem.specs, out_specs=P("ep"))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(smap(x, *problem.arrays[1:]) ** 2)))
    text = gradient.lower(problem.x).as_text()
    sends = sum(text.count(f"@smfree_{op}_send") for op in ("dispatch", "combine"))
    assert sends == 3 + 2
    assert np.isfinite(gradient(problem.x)).all()


@portable_too
def test_vmap_over_an_axis_of_the_mesh(groups):
    """A batch of one entry per shard is that entry, whatever its rows are."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, hidden=HIDDEN)

    def local(*arrays):
        return layer(smfree, group.token(), *arrays)[1]

    def of_one(x, idx, weights, kernel):
        batched = jax.vmap(local, in_axes=(0, 0, 0, None))
        return batched(x[None], idx[None], weights[None], kernel)[0]

    smap = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=problem.specs, out_specs=problem.rows
    )
    expected = jax.jit(smap(local))(*problem.arrays)
    np.testing.assert_array_equal(jax.jit(smap(of_one))(*problem.arrays), expected)


@portable_too
def test_export(groups):
    """A program whose rows are pytrees is exported, and computes the same."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, hidden=HIDDEN)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=problem.specs, out_specs=problem.rows)
    def step(*arrays):
        return layer(smfree, group.token(), *arrays, wire=WIRE)[1]

    checks = smfree.DISABLE_JAX_EXPORT_CHECKS
    exported = jax.export.export(step, disabled_checks=checks)(*problem.arrays)
    again = jax.export.deserialize(exported.serialize())
    actual = jax.jit(again.call)(*problem.arrays)
    np.testing.assert_array_equal(actual, step(*problem.arrays))


@portable_too
def test_a_token_in_flight_with_a_pytree_crosses_programs(groups):
    """What its rows are is static data of the token."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, hidden=HIDDEN)
    spec = group.token_spec
    smap = functools.partial(jax.shard_map, mesh=mesh)

    @jax.jit
    @functools.partial(smap, in_specs=problem.specs[:3], out_specs=spec)
    def send(x, idx, weights):
        return smfree.dispatch_send(group.token(), {"x": x, "i": idx}, idx, weights)

    @jax.jit
    @functools.partial(smap, in_specs=spec, out_specs=spec)
    def receive(token):
        return smfree.dispatch_recv(token)[0].x

    rows = receive(send(*problem.arrays[:3]))
    assert rows["x"].shape[1:] == (HIDDEN,) and rows["i"].shape[1:] == (2,)
    with pytest.raises(ValueError, match="combine_send returned"):
        jax.eval_shape(
            smap(smfree.combine_recv, in_specs=spec, out_specs=spec), send(*problem.arrays[:3])
        )


@portable_too
def test_nothing_was_sent_for_a_derivative(groups):
    """That of a token in flight may be zero as an array: rows have none, what is added has its."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, hidden=HIDDEN)

    def zeros(token):
        return jax.tree.map(
            lambda v: jnp.zeros_like(v) if v.dtype == jnp.float32 else np.zeros(v.shape, FLOAT0),
            token,
        )

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=problem.specs[:3], out_specs=problem.rows)
    def derivatives(x, idx, weights):
        def send(x):
            return smfree.dispatch_send(group.token(), x, idx, weights)

        token, transposed = jax.vjp(send, x)
        (x_bar,) = transposed(zeros(token))
        d, token = smfree.dispatch_recv(token)

        def receive(token, s):
            return smfree.combine_recv(token, add=s)[0]

        token = smfree.combine_send(token, d, d.x)
        out, out_dot = jax.jvp(receive, (token, x), (zeros(token), 2 * x))
        return out, x_bar, out_dot

    out, x_bar, out_dot = jax.jit(derivatives)(*problem.arrays[:3])
    assert jnp.isfinite(out).all()
    np.testing.assert_array_equal(x_bar, 0)
    np.testing.assert_array_equal(out_dot, 2 * problem.x)
