# SPDX-License-Identifier: Apache-2.0
"""The library's programs of one case: checked, timed as a whole, and looked into by its trace."""

from __future__ import annotations

import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

import jax_smfree as smfree
from benchmarks.gpu.cases import Case, Scale
from benchmarks.gpu.timing import Run, prepare
from benchmarks.gpu.trace import Recording, Tracer
from benchmarks.results import Json
from jax_smfree._src import reference
from jax_smfree.bench.cases import AXIS
from jax_smfree.bench.overlapped import exchange_around, products

# Far apart on purpose: a difference this large is an error, a smaller one is the order of a sum.
MAX_RELATIVE_ERROR = 2e-3


def config_of(case: Case, **options: Any) -> smfree.EpConfig:
    shape = case.shape
    settings = {
        "num_experts": shape.experts,
        "top_k": shape.top_k,
        "hidden": shape.hidden,
        "max_tokens": shape.rows,
        "dtype": jnp.dtype(shape.dtype),
        "recv_capacity": shape.capacity,
        "overflow": "error",
        "timeout_s": 20.0,
        "differentiable": False,
    }
    return smfree.EpConfig(**{**settings, **options})


@functools.cache
def expected(case: Case) -> list[Array]:
    """The oracle's d.x, d.weights, d.group_sizes and round trip, made once, kept on the devices."""
    config = config_of(case)

    def round_trip(x: Array, topk_idx: Array, topk_weights: Array) -> list[Array]:
        d = reference.dispatch(x, topk_idx, topk_weights, axis=AXIS, config=config)
        return [d.x, d.weights, d.group_sizes, reference.combine(d, d.x, d.weights)]

    results: list[Array] = prepare(case.mesh, {"": (round_trip, *case.inputs)})[""]()
    return results


def differences(mine: list[Array], theirs: list[Array]) -> list[tuple[Array, Array]]:
    """Of each pair: elements with other bits, and the norm of the difference over the norm."""

    def compare(x: Array, y: Array) -> tuple[Array, Array]:
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = [jax.lax.bitcast_convert_type(v, unsigned) for v in (x, y)]
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        error = jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())
        return (bits[0] != bits[1]).sum(dtype=jnp.int32)[None], error[None]

    return list(map(compare, mine, theirs))


class Library:
    """A group and its programs, for the inside of ``shard_map``; leaving it closes the group."""

    def __init__(self, case: Case, scale: Scale, **options: Any) -> None:
        self.case, self.scale = case, scale
        self.group = smfree.EpGroup.create(case.mesh, axis=AXIS, config=config_of(case, **options))
        # Only groups of GPUs have traces.
        on_cpu = case.mesh.devices.flat[0].platform == "cpu"
        self.tracer = None if on_cpu else Tracer(self.group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self.group:
            if kind is None:
                self.group.check()

    def dispatch(self, *inputs: Array) -> smfree.DispatchResult:
        d, _ = smfree.dispatch(self.group.token(), *inputs)
        return d

    def dispatch_fp8(self, *inputs: Array) -> Any:
        """Half the bytes on the wire, and rows as they were given."""
        d, _ = smfree.dispatch(self.group.token(), *inputs, wire=smfree.Fp8())
        return d.x, d.weights, d.group_sizes

    def dispatch_fp8_kept(self, *inputs: Array) -> Any:
        """The same, into values of 8 bits and their scales."""
        d, _ = smfree.dispatch(self.group.token(), *inputs, wire=smfree.Fp8(), keep=True)
        return d.x, d.weights, d.group_sizes

    def combine(self, d: smfree.DispatchResult) -> Array:
        out, _ = smfree.combine(self.group.token(), d, d.x)
        return out

    def round_trip(self, *inputs: Array) -> Array:
        d, token = smfree.dispatch(self.group.token(), *inputs)
        out, _ = smfree.combine(token, d, d.x)
        return out

    def around_dispatch(self, gemms: int, *args: Array) -> tuple[Array, Array]:
        *inputs, a, w = args
        token = smfree.dispatch_send(self.group.token(), *inputs)
        token, a = smfree.overlap(token, functools.partial(products, gemms), a, w)
        d, _ = smfree.dispatch_recv(token)
        return d.x, a

    def around_both(self, gemms: int, *args: Array) -> tuple[Array, Array]:
        """``gemms`` products around the dispatch, and as many around the combine."""
        return exchange_around(self.group, gemms, *args)

    def apart(self, gemms: int, *args: Array) -> tuple[Array, Array]:
        """``gemms`` products between the operations, where no rows move."""
        *inputs, a, w = args
        d, token = smfree.dispatch(self.group.token(), *inputs)
        token, a, w = smfree.tie(token, a, w)
        token, a = smfree.tie(token, products(gemms, a, w))
        out, _ = smfree.combine(token, d, d.x)
        return out, a

    def record(self, run: Run) -> list[Recording]:
        assert self.tracer is not None
        # The first one may be the one that XLA compiles or captures for.
        return [self.tracer(run, self.scale.lead_in) for _ in range(self.scale.traces + 1)][1:]

    def check_fp8(self) -> None:
        """Raises if what the two ways of a quantised dispatch give is not the same, bit by bit."""
        programs = {"rows": self.dispatch_fp8, "kept": self.dispatch_fp8_kept}
        inputs = self.case.inputs
        runs = prepare(self.case.mesh, {n: (p, *inputs) for n, p in programs.items()})
        rows, kept = runs["rows"](), runs["kept"]()
        self.group.check()

        def restored(values: Array, scales: Array) -> Array:
            blocks = values.astype(jnp.float32).reshape(*scales.shape, -1)
            return (blocks * scales[..., None]).astype(jnp.bfloat16).reshape(values.shape)

        of_kept = prepare(self.case.mesh, {"": (restored, *kept[0])})[""]()
        mine, theirs = [rows[0], *rows[1:]], [of_kept, *kept[1:]]
        compare = prepare(self.case.mesh, {"": (differences, mine, theirs)})[""]
        for name, (other, _) in zip(("x", "weights", "group_sizes"), compare(), strict=True):
            if other.sum():
                raise AssertionError(f"{name} differs between rows and what was kept of them")

    def check(self, into: Json) -> None:
        """Raises if the results are not those of the oracle: rows, weights and sizes bit by bit."""
        runs = prepare(self.case.mesh, {"dispatch": (self.dispatch, *self.case.inputs)})
        d = runs["dispatch"]()
        out = prepare(self.case.mesh, {"": (self.combine, d)})[""]()
        self.group.check()
        names = ("d.x", "d.weights", "d.group_sizes", "out")
        results = [d.x, d.weights, d.group_sizes, out]
        compare = prepare(self.case.mesh, {"": (differences, results, expected(self.case))})[""]
        for name, (other, error) in zip(names, compare(), strict=True):
            into[name] = {"other_bits": int(other.sum()), "relative_error": float(error.max())}
            exact = name != "out"
            if into[name]["other_bits"] if exact else not error.max() <= MAX_RELATIVE_ERROR:
                raise AssertionError(f"{name} is wrong: {into[name]}")
