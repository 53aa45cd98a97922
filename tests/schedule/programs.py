# SPDX-License-Identifier: Apache-2.0
"""Compiles MoE programs for eight H100 GPUs, none of which need be there, and writes the schedules.

    python programs.py OUTPUT_DIRECTORY [PROGRAM ...]

writes ``<program>.on.hlo`` and ``<program>.off.hlo``, with XLA's latency-hiding scheduler on and
off (jax 0.10 has it always on). A process of its own, because what lets the CUDA plugin load
without a GPU must be set before JAX starts, and must not reach the tests that run on CPUs.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin is used to compile, not to run
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # else it refuses to load without a driver

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import nn

RANKS, ROWS, HIDDEN, EXPERTS, TOP_K, LAYERS = 8, 1024, 1024, 16, 2, 3
CAPACITY = 4 * ROWS
LATENCY_HIDING = {"on": True, "off": False}

H100 = pathlib.Path(__file__).with_name("h100.txtpb").read_text()
MESH = topologies.make_mesh(
    topo=topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x1x{RANKS}"),
    mesh_shape=(RANKS,),
    axis_names=("ep",),
)
GROUP = smfree.EpGroup.create(
    MESH,
    config=smfree.EpConfig(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        max_tokens=ROWS,
        recv_capacity=CAPACITY,
        num_lanes=2,
    ),
)

# A layer's parameters: matrices of the dense computations, which the tests find by these names.
Params = dict[str, tuple[jax.Array, jax.Array]]
Routes = tuple[jax.Array, jax.Array]


def mlp(name: str, x: jax.Array, params: Params) -> jax.Array:
    """Two matrix multiplications, whose backward pass has four."""
    up, down = params[name]
    with jax.named_scope(name):
        return jnp.tanh(x @ up) @ down


def layer(token: Any, x: jax.Array, routes: Routes, params: Params) -> Any:
    """One MoE layer with work under both communications."""
    token = smfree.dispatch_send(token, x, *routes)
    token, s = smfree.overlap(token, lambda x, p: mlp("under_dispatch", x, p), x, params)
    d, token = smfree.dispatch_recv(token)
    y = mlp("expert", d.x, params)
    token = smfree.combine_send(token, d, y)
    token, z = smfree.overlap(token, lambda s, p: mlp("under_combine", s, p), s, params)
    out, token = smfree.combine_recv(token)
    return token, jnp.tanh(out + z)


def one_layer(x: jax.Array, routes: Routes, params: Params) -> jax.Array:
    """A layer on its own."""
    return layer(GROUP.token(), x, routes, params)[1]


def untied_layer(x: jax.Array, routes: Routes, params: Params) -> jax.Array:
    """A layer that leaves it to XLA what runs where."""
    token = smfree.dispatch_send(GROUP.token(), x, *routes)
    s = mlp("under_dispatch", x, params)
    d, token = smfree.dispatch_recv(token)
    token = smfree.combine_send(token, d, mlp("expert", d.x, params))
    z = mlp("under_combine", s, params)
    out, token = smfree.combine_recv(token)
    return jnp.tanh(out + z)


def layers(wrap: Callable[[Any], Any]) -> Callable[..., jax.Array]:
    """A scan over layers with the token in its carry."""

    def run(x: jax.Array, routes: Routes, params: Params) -> jax.Array:
        def body(carry: Any, _: Any) -> Any:
            token, x = carry
            return wrap(layer)(token, x, routes, params), None

        (_, x), _ = jax.lax.scan(body, (GROUP.token(), x), None, length=LAYERS)
        return x

    return run


def two_lanes(x: jax.Array, routes: Routes, params: Params) -> jax.Array:
    """Two micro-batches, each computing while the rows of the other move."""
    half = ROWS // 2
    (x0, x1), (r0, r1) = (
        [jax.tree.map(lambda a, s=s: a[s : s + half], v) for s in (0, half)] for v in (x, routes)
    )
    t0 = smfree.dispatch_send(GROUP.token(0), x0, *r0)
    t0, s0 = smfree.overlap(t0, lambda x, p: mlp("under_dispatch", x, p), x0, params)
    d0, t0 = smfree.dispatch_recv(t0)
    t1 = smfree.dispatch_send(GROUP.token(1), x1, *r1)
    t1, y0 = smfree.overlap(t1, lambda x, p: mlp("expert", x, p), d0.x, params)
    d1, t1 = smfree.dispatch_recv(t1)
    t0 = smfree.combine_send(t0, d0, y0)
    t0, y1 = smfree.overlap(t0, lambda x, p: mlp("expert", x, p), d1.x, params)
    o0, t0 = smfree.combine_recv(t0)
    t1 = smfree.combine_send(t1, d1, y1)
    t1, s1 = smfree.overlap(t1, lambda x, p: mlp("under_combine", x, p), x1, params)
    o1, t1 = smfree.combine_recv(t1)
    return jnp.concatenate([o0 + s0, o1 + s1])


def gradient(model: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The value and all gradients of a loss of ``model``."""

    def loss(x: jax.Array, weights: jax.Array, idx: jax.Array, params: Params) -> jax.Array:
        return jnp.sum(model(x, (idx, weights), params).astype(jnp.float32) ** 2)

    def run(x: jax.Array, routes: Routes, params: Params) -> Any:
        return jax.value_and_grad(loss, (0, 1, 3))(x, routes[1], routes[0], params)

    return run


def array(shape: tuple[int, ...], dtype: Any, spec: P | None = None) -> jax.ShapeDtypeStruct:
    """A global argument, replicated without ``spec``."""
    sharding = NamedSharding(MESH, spec or P())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def arguments() -> tuple[Any, ...]:
    """Rows, routes and parameters of the layers of this file."""
    rows, matrix, split = RANKS * ROWS, (HIDDEN, HIDDEN), P("ep")
    dense = (array(matrix, jnp.bfloat16),) * 2
    expert = (array((RANKS * HIDDEN, HIDDEN), jnp.bfloat16, split),) * 2
    routes = array((rows, TOP_K), jnp.int32, split), array((rows, TOP_K), jnp.float32, split)
    params = {"under_dispatch": dense, "under_combine": dense, "expert": expert}
    return array((rows, HIDDEN), jnp.bfloat16, split), routes, params


def sharded(model: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``model``, over the ranks."""
    specs = jax.tree.map(lambda a: a.sharding.spec, arguments())
    return jax.shard_map(model, mesh=MESH, in_specs=specs, out_specs=P("ep"))


def keep(layer: Any) -> Any:
    """No wrapper."""
    return layer


def checkpoint_saving(layer: Any) -> Any:
    """Computes all again in the backward pass, but sends nothing again."""
    return jax.checkpoint(layer, policy=smfree.save_comm_policy)


def nn_arguments(shared_width: int = HIDDEN // 2) -> tuple[nn.MoeParams, jax.ShapeDtypeStruct]:
    """Parameters of a layer of ``jax_smfree.nn``, and rows."""
    init = functools.partial(
        nn.init_moe, hidden=HIDDEN, num_experts=EXPERTS, expert_width=HIDDEN // 2,
        shared_width=shared_width, dtype=jnp.bfloat16,
    )  # fmt: skip
    params = jax.eval_shape(init, jax.random.key(0))
    specs = nn.moe_specs(params, "ep")
    params = jax.tree.map(lambda a, spec: array(a.shape, a.dtype, spec), params, specs)
    return params, array((RANKS * ROWS, HIDDEN), jnp.bfloat16, P("ep"))


def nn_gradient(model: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The value and all gradients of a loss of a layer of ``jax_smfree.nn``."""

    def loss(params: nn.MoeParams, x: jax.Array) -> jax.Array:
        specs = nn.moe_specs(params, "ep"), P("ep")
        of_ranks = jax.shard_map(model, mesh=MESH, in_specs=specs, out_specs=P("ep"))
        return jnp.sum(of_ranks(params, x).astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, (0, 1))


def nn_layer(params: nn.MoeParams, x: jax.Array) -> jax.Array:
    """The layer, whose shared expert runs under the dispatch, and ends under the combine."""
    return nn.moe_layer(GROUP.token(), params, x)[1]


def nn_two_batches(params: nn.MoeParams, x: jax.Array) -> jax.Array:
    """Two micro-batches that hide each other's communication."""
    xs = x[: ROWS // 2], x[ROWS // 2 :]
    _, outs, _ = nn.moe_two_batches((GROUP.token(0), GROUP.token(1)), params, xs)
    return jnp.concatenate(outs)


# Name: the function, and a function that makes its arguments.
PROGRAMS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "forward": (sharded(one_layer), arguments),
    "untied": (sharded(untied_layer), arguments),
    "gradient": (gradient(sharded(one_layer)), arguments),
    "scan": (gradient(sharded(layers(keep))), arguments),
    "checkpoint": (gradient(sharded(layers(jax.checkpoint))), arguments),
    "checkpoint_saving": (gradient(sharded(layers(checkpoint_saving))), arguments),
    "two_lanes": (gradient(sharded(two_lanes)), arguments),
    "nn_layer": (nn_gradient(nn_layer), nn_arguments),
    "nn_without_shared": (nn_gradient(nn_layer), functools.partial(nn_arguments, 0)),
    "nn_two_batches": (nn_gradient(nn_two_batches), nn_arguments),
}


def main(directory: pathlib.Path, names: list[str]) -> None:
    """Writes the schedules of the named programs, or of all."""
    for name in names or PROGRAMS:
        function, make_arguments = PROGRAMS[name]
        lowered = jax.jit(function).lower(*make_arguments())
        for label, enabled in LATENCY_HIDING.items():
            options = {
                "xla_gpu_autotune_level": 0,  # it would run the candidates
                "xla_gpu_enable_latency_hiding_scheduler": enabled,
            }
            text = lowered.compile(compiler_options=options).as_text()
            (directory / f"{name}.{label}.hlo").write_text(text)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
