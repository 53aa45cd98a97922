# SPDX-License-Identifier: Apache-2.0
"""A whole MoE layer, forward and backward: over the library, and over JAX's collectives.

Both sides have the same router, experts, shared expert, capacity and grouped matmul, the library's
default one.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.gpu.cases import Case, GpuShape, Scale
from benchmarks.gpu.library import Library
from benchmarks.gpu.timing import Run, batch_times, summary
from benchmarks.results import Json
from jax_smfree import nn
from jax_smfree.bench.cases import AXIS
from jax_smfree.bench.jax_ways import route

# Gradients are rounded to bfloat16 at other places, and where two experts tie for the last place of
# a row, one program may take the one and the other the other.
MAX_RELATIVE_ERROR = 5e-2
SPARE_ROWS = 128  # of a rank, for such ties
Layer = Callable[[nn.MoeParams, Array], Array]


def gathered_layer(shape: GpuShape, params: nn.MoeParams, x: Array) -> Array:
    """``nn.moe_layer`` with all_gather and gather, scatter-add and psum_scatter."""
    routes = nn.route(x, params.router, nn.RouterConfig(shape.top_k, normalise=shape.top_k > 1))
    routing = route(shape, routes.topk_idx)
    filled = jnp.arange(shape.capacity) < routing.group_sizes.sum()
    copy = routing.copy_of_row
    row = jnp.where(filled, copy // shape.top_k, shape.ranks * shape.rows)  # out of bounds: none

    everything = lax.all_gather(x, AXIS, tiled=True)
    picked = everything.at[row].get(mode="fill", fill_value=0)
    shared = 0 if params.shared is None else nn.mlp(x, params.shared)
    local_expert = nn.local_expert(routing.group_sizes, shape.capacity)
    y = nn.grouped_mlp(picked, routing.group_sizes, local_expert, params.experts)
    # Not by a weight of zero: rows past the last group may be NaN.
    weights = jnp.where(filled, lax.all_gather(routes.topk_weights, AXIS).reshape(-1)[copy], 0)
    out = jnp.zeros((shape.ranks * shape.rows, shape.hidden), jnp.float32)
    out = out.at[row].add(weights[:, None] * y.astype(jnp.float32), mode="drop")
    return lax.psum_scatter(out.astype(x.dtype), AXIS, tiled=True) + shared


class Model:
    """Parameters on the devices, and what a step over a layer is."""

    def __init__(self, case: Case, width: int, shared_width: int) -> None:
        self._case, self._tracing = case, threading.Lock()
        init = functools.partial(
            nn.init_moe,
            hidden=case.shape.hidden,
            num_experts=case.shape.experts,
            expert_width=width,
            shared_width=shared_width,
            dtype=jnp.dtype(case.shape.dtype),
        )
        key = jax.random.key(3)
        self._specs = nn.moe_specs(jax.eval_shape(init, key), AXIS)
        shardings = jax.tree.map(lambda spec: NamedSharding(case.mesh, spec), self._specs)
        self.params = jax.jit(init, out_shardings=shardings)(key)

    def compiled(self, functions: Mapping[str, Callable[..., Any]]) -> dict[str, Run]:
        """Each of the parameters and x, compiled side by side and bound to these."""
        with ThreadPoolExecutor() as pool:
            compiling = {name: self.start(pool, f) for name, f in functions.items()}
        return {name: self.bound(each.result()) for name, each in compiling.items()}

    def start(self, pool: ThreadPoolExecutor, f: Callable[..., Any]) -> Future[Any]:
        """Compiles it, beside what else the pool compiles."""

        def compiled() -> Any:
            with self._tracing:  # which is Python's work, so that two at a time gain nothing
                lowered = jax.jit(self.mapped(f)).lower(*self.operands)
            return lowered.compile()

        return pool.submit(compiled)

    def bound(self, executable: Any) -> Run:
        return functools.partial(executable, *self.operands)

    @property
    def operands(self) -> tuple[nn.MoeParams, Array]:
        return self.params, self._case.x

    def mapped(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """What each rank does, of global arrays."""
        specs = self._specs, P(AXIS)
        mapped: Callable[..., Any] = jax.shard_map(
            f, mesh=self._case.mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False
        )
        return mapped

    def steps(self, layers: Mapping[str, Layer]) -> dict[str, Run]:
        return self.compiled({name: step_of(layer) for name, layer in layers.items()})

    def shape(self) -> GpuShape:
        """With the capacity that the router needs at the rank that it sends most."""
        return dataclasses.replace(self._case.shape, needed=self._fullest() + SPARE_ROWS)

    def _fullest(self) -> int:
        shape = self._case.shape

        def load(params: nn.MoeParams, x: Array) -> Array:
            routes = nn.route(
                x, params.router, nn.RouterConfig(shape.top_k, normalise=shape.top_k > 1)
            )
            return nn.expert_load(routes.topk_idx, shape.experts)

        loads = np.asarray(self.compiled({"": load})[""]()).reshape(shape.ranks, shape.ranks, -1)
        return int(loads.sum(axis=(0, 2)).max())


def step_of(layer: Layer) -> Callable[[nn.MoeParams, Array], Any]:
    """Output and all gradients; those of what is replicated are not summed over the ranks."""

    def forward_backward(params: nn.MoeParams, x: Array) -> Any:
        out, pull = jax.vjp(layer, params, x)
        return out, *pull(x)

    return forward_backward


def check_same(into: Json, mine: Any, theirs: Any) -> None:
    """Raises if any output or gradient differs by more than rounding, relative to its norm."""
    errors = jax.tree.map(_relative_error, mine, theirs)
    into["relative_error"] = max(map(float, jax.tree.leaves(errors)))
    if not into["relative_error"] <= MAX_RELATIVE_ERROR:
        raise AssertionError(f"the two layers differ by {into['relative_error']}")


@jax.jit
def _relative_error(x: Array, y: Array) -> Array:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sqrt(((x - y) ** 2).sum() / (y**2).sum())


def measure(into: Json, case: Case, scale: Scale, **options: Any) -> None:
    model = Model(case, scale.expert_width, scale.expert_width)
    shape = model.shape()
    into.update(expert_width=scale.expert_width, capacity=shape.capacity)
    options = {"recv_capacity": shape.capacity, **options}
    with Library(case, scale, differentiable=True, **options) as library:

        def ours(params: nn.MoeParams, x: Array) -> Array:
            return nn.moe_layer(library.group.token(), params, x)[1]

        layers: dict[str, Layer] = {
            "jax_smfree": ours,
            "all_gather": functools.partial(gathered_layer, shape),
        }
        steps = model.steps(layers)
        check_same(into, *(step() for step in steps.values()))
        library.group.check()
        calls = max(2, scale.calls // 4)
        for name, step in steps.items():
            into[name] = summary(batch_times(step, calls, scale.batches))
        into["speed_up"] = round(into["all_gather"]["p50"] / into["jax_smfree"]["p50"], 3)
        if library.tracer:
            recordings = library.record(steps["jax_smfree"])
            for name, mirrored in (("forward", False), ("backward", True)):
                times = [r.total_us(mirrored) for r in recordings]
                into[f"{name}_phases"] = summary(times)
