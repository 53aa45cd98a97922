# SPDX-License-Identifier: Apache-2.0
"""The same MoE model through the library and the reference, under every JAX transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree._src import reference
from support import (
    IN_NODES,
    PORTABLE,
    as_many,
    assert_trees_close,
    backend,
    block,
    ep_mesh,
    in_both_modes,
    make_problem,
    mesh_of,
    portable_too,
    reference_of,
)

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}
LAYERS = 2


def plain(layer):
    return layer


MODES = {
    "plain": plain,
    "checkpoint": jax.checkpoint,
    "checkpoint_save_comm": functools.partial(jax.checkpoint, policy=smfree.save_comm_policy),
    "checkpoint_dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable
    ),
    "nested_checkpoint": lambda layer: jax.checkpoint(jax.checkpoint(layer)),
    "jit": jax.jit,
}


def loop(ops, token, x, idx, weights, kernel, wrap):
    layer = wrap(functools.partial(block, ops))
    for _ in range(LAYERS):
        token, x = layer(token, x, idx, weights, kernel)
    return token, x


def scan(ops, token, x, idx, weights, kernel, wrap):
    layer = wrap(functools.partial(block, ops))

    def step(carry, _):
        return layer(*carry, idx, weights, kernel), None

    return jax.lax.scan(step, (token, x), length=LAYERS)[0]


def cond(ops, token, x, idx, weights, kernel, wrap):
    layer = wrap(functools.partial(block, ops))

    def yes(token, x):
        return layer(token, x, idx, weights, kernel)

    def no(token, x):
        return token, x

    for i in range(LAYERS):
        everywhere = jax.lax.psum(kernel[0, 0], "ep") * 0 + i < LAYERS - 1
        token, x = jax.lax.cond(everywhere, yes, no, token, x)
    return token, x


STRUCTURES = {"loop": loop, "scan": scan, "cond": cond}


def loss_fn(ops, start, problem, model, *, check_vma=True):
    """A scalar function of the problem's arrays; ``start()`` makes the first token."""

    def local(*arrays):
        _, out = model(ops, start(), *arrays)
        return jnp.sum(out.astype(jnp.float32) ** 2)[None]

    sharded = jax.shard_map(
        local,
        mesh=problem.mesh,
        in_specs=problem.specs,
        out_specs=problem.rows,
        check_vma=check_vma,
    )
    return lambda *arrays: jnp.sum(sharded(*arrays))


def value_and_grads(ops, start, problem, model, **kwargs):
    loss = loss_fn(ops, start, problem, model, **kwargs)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3)))(*problem.arrays)


def assert_matches_reference(group, problem, model, reference_model=None, **kwargs):
    actual = value_and_grads(smfree, group.token, problem, model, **kwargs)
    reference_group = reference_of(group)
    expected = value_and_grads(
        reference, reference_group.token, problem, reference_model or model, **kwargs
    )
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", ["ep", "data,ep", "ep,data", "explicit"])
def test_meshes(groups, kind, check_vma):
    mesh = mesh_of(kind)
    group = groups(mesh, **CONFIG)
    model = functools.partial(loop, wrap=plain)
    with jax.set_mesh(mesh) if kind == "explicit" else jax.disable_jit(False):
        assert_matches_reference(group, make_problem(mesh), model, check_vma=check_vma)


@functools.cache
def expected_gradients(structure):
    problem = make_problem(ep_mesh(as_many(4)))
    group = reference.Group("ep", smfree.EpConfig(**CONFIG))
    model = functools.partial(STRUCTURES[structure], wrap=plain)
    return value_and_grads(reference, group.token, problem, model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients(groups, structure, mode):
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    model = functools.partial(STRUCTURES[structure], wrap=MODES[mode])
    actual = value_and_grads(smfree, group.token, make_problem(mesh), model)
    assert_trees_close(actual, expected_gradients(structure))


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("groups", "structure", "mode"),
    [
        (IN_NODES, "loop", "jit"),
        (IN_NODES, "scan", "checkpoint"),
        (IN_NODES, "cond", "nested_checkpoint"),
        (PORTABLE, "scan", "checkpoint"),
        (PORTABLE, "cond", "checkpoint_save_comm"),
    ],
    indirect=["groups"],
)
def test_gradients_of_other_groups(groups, structure, mode):
    mesh = ep_mesh(4)
    group = groups(mesh, **CONFIG)
    model = functools.partial(STRUCTURES[structure], wrap=MODES[mode])
    actual = value_and_grads(smfree, group.token, make_problem(mesh), model)
    assert_trees_close(actual, expected_gradients(structure))


def test_checkpoint_names(groups):
    """A policy that saves d.x by name keeps it; the routing is kept anyway."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)

    def named(ops, token, x, idx, weights, kernel):
        token = ops.dispatch_send(token, x, idx, weights)
        d, token = ops.dispatch_recv(token)
        rows = checkpoint_name(d.x, "rows")
        token = ops.combine_send(token, d, jnp.tanh(rows @ kernel))
        return ops.combine_recv(token)[::-1]

    policy = jax.checkpoint_policies.save_only_these_names("rows")
    wrapped = jax.checkpoint(named, policy=policy, static_argnums=0)
    assert_matches_reference(group, make_problem(mesh), wrapped, named)


@in_both_modes
def test_two_micro_batches_on_two_lanes(groups):
    """One jitted layer, traced once per lane, with both in flight at once."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG, num_lanes=2)
    layer = jax.jit(functools.partial(block, smfree))

    def model(ops, tokens, x, idx, weights, kernel):
        run = layer if ops is smfree else functools.partial(block, ops)
        tokens = list(tokens)
        parts = [jnp.split(v, 2) for v in (x, idx, weights)]
        halves = list(parts[0])
        for _ in range(LAYERS):
            for lane in range(2):
                args = (halves[lane], parts[1][lane], parts[2][lane], kernel)
                tokens[lane], halves[lane] = run(tokens[lane], *args)
        return tokens, jnp.concatenate(halves)

    problem = make_problem(mesh)
    actual = value_and_grads(
        smfree, lambda: [group.token(lane) for lane in range(2)], problem, model
    )
    other = reference_of(group)
    expected = value_and_grads(reference, lambda: [other.token()] * 2, problem, model)
    assert_trees_close(actual, expected)


@in_both_modes
def test_two_groups_in_one_program(groups):
    mesh = mesh_of("data,ep")
    first = groups(mesh, "ep", **CONFIG)
    second = groups(mesh, "data", **CONFIG)

    def model(ops, tokens, *arrays):
        token, x = block(ops, tokens[0], *arrays)
        _, x = block(ops, tokens[1], x, *arrays[1:])
        return token, x

    problem = make_problem(mesh)
    actual = value_and_grads(smfree, lambda: (first.token(), second.token()), problem, model)
    others = (reference_of(first), reference_of(second))
    expected = value_and_grads(
        reference, lambda: tuple(other.token() for other in others), problem, model
    )
    assert_trees_close(actual, expected)


@in_both_modes
def test_layers_with_their_own_shard_map(groups):
    """Fresh tokens, ordered by data; and one token that crosses the shard_map boundaries."""
    mesh = mesh_of("data,ep")
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)
    smap = functools.partial(jax.shard_map, mesh=mesh)

    @functools.partial(smap, in_specs=problem.specs, out_specs=problem.rows)
    def fresh(*arrays):
        return block(smfree, group.token(), *arrays)[1]

    spec = group.token_spec

    @functools.partial(smap, in_specs=(spec, *problem.specs), out_specs=(spec, problem.rows))
    def threaded(token, *arrays):
        return block(smfree, token, *arrays)

    other = reference_of(group)

    @functools.partial(smap, in_specs=problem.specs, out_specs=problem.rows)
    def plain_layer(*arrays):
        return block(reference, other.token(), *arrays)[1]

    def loss_fresh(x, idx, weights, kernel, layer=fresh):
        for _ in range(LAYERS):
            x = layer(x, idx, weights, kernel)
        return jnp.sum(x**2)

    def loss_threaded(x, idx, weights, kernel, token=None):
        token = group.token() if token is None else token
        for _ in range(LAYERS):
            token, x = threaded(token, x, idx, weights, kernel)
        return jnp.sum(x**2)

    def run(loss):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3)))(*problem.arrays)

    expected = run(functools.partial(loss_fresh, layer=plain_layer))
    assert_trees_close(run(loss_fresh), expected)
    assert_trees_close(run(jax.checkpoint(loss_fresh)), expected)
    assert_trees_close(run(loss_threaded), expected)
    assert_trees_close(run(functools.partial(loss_threaded, token=group.token())), expected)


@in_both_modes
def test_token_is_carried_between_calls(groups):
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)
    spec = group.token_spec

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec, *problem.specs),
        out_specs=(spec, problem.rows),
    )
    def step(token, *arrays):
        return block(smfree, token, *arrays)

    token, first = step(group.token(), *problem.arrays)
    for _ in range(5):
        token, again = step(token, *problem.arrays)
    np.testing.assert_array_equal(first, again)
    numbers = np.asarray(token.array).reshape(mesh.size, -1)[:, 2]
    if backend() == "cuda":
        numbers = numbers // 2  # the lowest bit is the parity of a set of buffers
    np.testing.assert_array_equal(numbers, 12)


@in_both_modes
def test_eager_shard_map(groups):
    """Without jit every primitive is a program of its own; the recv finds its send all the same."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)

    def local(x, idx, weights, kernel):
        d, token = smfree.dispatch(group.token(), x, idx, weights)
        return smfree.combine(token, d, d.x)[0]

    smap = functools.partial(jax.shard_map, mesh=mesh, in_specs=problem.specs)
    step = smap(local, out_specs=problem.rows)
    np.testing.assert_array_equal(step(*problem.arrays), jax.jit(step)(*problem.arrays))


@in_both_modes
def test_forward_and_second_order_derivatives(groups):
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)
    x, idx, weights, kernel = problem.arrays
    tangents = (jnp.cos(x), jnp.sin(weights), jnp.cos(kernel))

    def derivatives(ops, start):
        loss = loss_fn(ops, start, problem, block)

        def of(x, weights, kernel):
            return loss(x, idx, weights, kernel)

        primals = (x, weights, kernel)
        grad = jax.grad(of, argnums=(0, 1, 2))
        return [jax.jit(functools.partial(jax.jvp, f))(primals, tangents) for f in (of, grad)]

    actual = derivatives(smfree, group.token)
    expected = derivatives(reference, reference_of(group).token)
    assert_trees_close(actual, expected, tolerance=1e-4)


def test_gradient_of_the_weights_alone_sends_less(groups):
    """What nobody asks for is not sent: no orphan, and no message for an unused gradient."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)
    loss = loss_fn(smfree, group.token, problem, block)

    def calls(argnums):
        text = jax.jit(jax.grad(loss, argnums)).lower(*problem.arrays).as_text()
        sends = sum(text.count(f"@smfree_{op}_send") for op in ("dispatch", "combine"))
        recvs = sum(text.count(f"@smfree_{op}_recv") for op in ("dispatch", "combine"))
        assert sends == recvs
        return sends

    assert calls(0) == 4
    assert calls(3) == 3


@in_both_modes
@pytest.mark.parametrize("lanes", [6, 24])
def test_many_independent_operations(groups, lanes):
    """More operations in flight than XLA has threads: nothing may block a thread (FFI futures)."""
    mesh = ep_mesh(as_many(8))
    config = CONFIG | {"hidden": 512, "max_tokens": 64}
    group = groups(mesh, **config, num_lanes=lanes)
    problem = make_problem(mesh, tokens=64, hidden=512)

    def local(x, idx, weights, kernel):
        total = jnp.zeros_like(x)
        for lane in range(lanes):
            _, out = block(smfree, group.token(lane), x * (lane + 1), idx, weights, kernel)
            total += out + jax.lax.psum(jnp.sum(out), "ep") * 1e-3
        return total

    smap = functools.partial(jax.shard_map, mesh=mesh, in_specs=problem.specs)
    step = jax.jit(smap(local, out_specs=problem.rows))
    results = [np.asarray(step(*problem.arrays)) for _ in range(5)]
    for again in results[1:]:
        np.testing.assert_array_equal(results[0], again)


@portable_too
def test_vmap_is_refused(groups):
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(None, "ep"),), out_specs=P(None, "ep"))
    def batched(x):
        idx = jnp.zeros((x.shape[1], 2), jnp.int32).at[:, 1].set(1)
        return jax.vmap(lambda row: smfree.dispatch(group.token(), row, idx)[0].x)(x)

    with pytest.raises(NotImplementedError, match="scan"):
        batched(jnp.stack([problem.x] * 2))


@portable_too
def test_not_differentiable_group(groups):
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG, differentiable=False)
    problem = make_problem(mesh)
    loss = loss_fn(smfree, group.token, problem, block)
    jax.jit(loss)(*problem.arrays)
    with pytest.raises(ValueError, match="differentiable=True"):
        jax.grad(loss)(*problem.arrays)


@in_both_modes
def test_native_mode_and_hooks_are_the_same(groups):
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)

    def native(x, idx, weights, kernel):
        d, token = smfree.dispatch(group.token(), x, idx, weights)
        out, _ = smfree.combine(token, d, d.x @ kernel)
        return out, x @ kernel

    def hooked(x, idx, weights, kernel):
        hook = smfree.dispatch(group.token(), x, idx, weights, return_recv_hook=True)
        shared = hook.overlap(lambda x: x @ kernel, x)
        d, token = hook()
        with pytest.raises(ValueError, match="once"):
            hook()
        hook = smfree.combine(token, d, d.x @ kernel, return_recv_hook=True)
        out, _ = hook()
        return out, shared

    smap = functools.partial(jax.shard_map, mesh=mesh, in_specs=problem.specs)
    specs = (problem.rows, problem.rows)
    a = jax.jit(smap(native, out_specs=specs))(*problem.arrays)
    b = jax.jit(smap(hooked, out_specs=specs))(*problem.arrays)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


def test_weights_of_combine(groups):
    """None is a plain sum; given weights replace those of the dispatch."""
    mesh = ep_mesh(as_many(4))
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh)

    def local(x, idx, weights, kernel):
        token = group.token()
        d, token = smfree.dispatch(token, x, idx, weights)
        ones, token = smfree.dispatch(token, x, idx)
        plain_sum, token = smfree.combine(token, d, d.x, weights=None)
        by_ones, token = smfree.combine(token, ones, ones.x)
        doubled, token = smfree.combine(token, d, d.x, weights=2 * d.weights)
        twice, token = smfree.combine(token, d, 2 * d.x)
        return plain_sum, by_ones, doubled, twice

    smap = functools.partial(jax.shard_map, mesh=mesh, in_specs=problem.specs)
    plain_sum, by_ones, doubled, twice = jax.jit(smap(local, out_specs=(problem.rows,) * 4))(
        *problem.arrays
    )
    np.testing.assert_array_equal(plain_sum, by_ones)
    np.testing.assert_array_equal(doubled, twice)
    count = np.sum(np.asarray(problem.topk_idx) >= 0, axis=1, keepdims=True)
    np.testing.assert_allclose(plain_sum, count * np.asarray(problem.x), rtol=1e-6)


def test_a_derivation_that_no_message_holds(groups):
    """Nested 16 times, a replay could not be told from another: refused while tracing."""
    mesh = ep_mesh(as_many(2))
    group, problem = groups(mesh, **CONFIG), make_problem(mesh)

    def gradient_of(depth):
        def model(ops, *operands):
            layer = functools.partial(block, ops)
            for _ in range(depth):
                layer = jax.checkpoint(layer)
            return layer(*operands)

        jax.eval_shape(jax.grad(loss_fn(smfree, group.token, problem, model)), *problem.arrays)

    gradient_of(8)
    with pytest.raises(ValueError, match=r"support\.py:\d+ in block is .*more than 15 times over"):
        gradient_of(20)
