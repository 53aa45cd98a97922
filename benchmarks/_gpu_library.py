# SPDX-License-Identifier: Apache-2.0
"""The library's programs of one case: checked, timed as a whole, and looked into by its trace."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from _gpu_cases import Case, Scale
from _gpu_timing import GEMM_COUNTS, Gemms, Json, Run, prepare, summary, timed
from _gpu_trace import KERNELS, Recording, Tracer
from jax import Array

import jax_smfree as smfree
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
    """A group and its programs, for the inside of ``shard_map``."""

    def __init__(self, case: Case, scale: Scale, **options: Any) -> None:
        self.case, self.scale = case, scale
        self.group = smfree.EpGroup.create(case.mesh, axis=AXIS, config=config_of(case, **options))
        # Only groups of GPUs have traces.
        on_cpu = case.mesh.devices.flat[0].platform == "cpu"
        self.tracer = None if on_cpu else Tracer(self.group)

    def dispatch(self, *inputs: Array) -> smfree.DispatchResult:
        d, _ = smfree.dispatch(self.group.token(), *inputs)
        return d

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

    def native(self, into: Json) -> None:
        """One call that does both phases: dispatch, combine, and one after the other."""
        case = self.case
        runs = prepare(
            case.mesh,
            {
                "dispatch": (self.dispatch, *case.inputs),
                "round_trip": (self.round_trip, *case.inputs),
            },
        )
        runs |= prepare(case.mesh, {"combine": (self.combine, runs["dispatch"]())})
        for name, run in runs.items():
            into[name] = timed(run, self.scale)
            directions = 2 if name == "round_trip" else 1
            for rate, moved in (("wire", case.wire_bytes), ("logical", case.logical_bytes)):
                per_us = directions * moved / into[name]["p50"]
                into[name][f"{rate}_gb_s"] = round(per_us / 1e3, 1)
        self.group.check()
        if self.tracer:
            for name, (first, last) in {
                "dispatch": (KERNELS[0], KERNELS[1]),
                "combine": (KERNELS[2], KERNELS[3]),
                "round_trip": (KERNELS[0], KERNELS[3]),
            }.items():
                times = [r.between_us(first, last, outer=True) for r in self.record(runs[name])]
                into[name]["on_device"] = summary(times)
            into["timeline"] = self.tracer(runs["round_trip"], self.scale.lead_in).to_json()

    def phases(self, into: Json, gemms: Gemms, gb_s: float) -> None:
        """The time of each phase where the rows have long arrived: no waiting is in it."""
        program = functools.partial(self.around_both, GEMM_COUNTS[-1])
        arguments = (*self.case.inputs, gemms.a, gemms.w)
        recordings = self.record(prepare(self.case.mesh, {"": (program, *arguments)})[""])
        self.group.check()
        total: list[float] = [0.0] * len(recordings)
        floor = 0.0
        for name in KERNELS:
            times = [r.slowest_us(name) for r in recordings]
            moved = max(p["bytes_read"] + p["bytes_written"] for p in recordings[-1].phases(name))
            into[name] = _against_floor(times, moved / gb_s / 1e3)
            into[name]["bytes"] = moved
            total = [a + b for a, b in zip(total, times, strict=True)]
            floor += moved / gb_s / 1e3
        into["total"] = _against_floor(total, floor)

    def overlap(self, into: Json, gemms: Gemms, phases: Json, egress_gb_s: float | None) -> None:
        """Chains of GEMMs with rows moving under them: what is left over, and what they suffer.

        All in device time, and in runs of one kind: a GPU that multiplies back to back has another
        clock than one that also unpacks.
        """
        arguments = (*self.case.inputs, gemms.a, gemms.w)
        programs = {
            "apart": self.apart,
            "dispatch": self.around_dispatch,
            "both": self.around_both,
        }
        runs = prepare(
            self.case.mesh,
            {
                f"{name} {count}": (functools.partial(program, count), *arguments)
                for name, program in programs.items()
                for count in GEMM_COUNTS
            },
        )
        wire_us = self.case.wire_bytes / egress_gb_s / 1e3 if egress_gb_s else None
        into.update(dispatch=[], both=[])
        for count in GEMM_COUNTS:
            alone = _gap_us(self.record(runs[f"apart {count}"]), "dispatch_recv", "combine_send")
            for name, operations in (("dispatch", KERNELS[:1]), ("both", KERNELS[::2])):
                recordings = self.record(runs[f"{name} {count}"])
                names = [send.removesuffix("_send") for send in operations]
                entry = {"gemms": count, "alone_us": alone * len(names)}
                into[name].append(
                    {**entry, **_overlapped(recordings, names, alone, phases, wire_us)}
                )
                if name == "both":
                    into["timeline"] = recordings[-1].to_json()
        self.group.check()


def _against_floor(times: list[float], floor_us: float) -> Json:
    result = summary(times)
    return {**result, "floor_us": round(floor_us, 2), "ratio": round(result["p50"] / floor_us, 3)}


def _gap_us(recordings: list[Recording], before: str, after: str) -> float:
    gaps = summary([r.between_us(before, after, outer=False) for r in recordings])
    return float(gaps["p50"])


def _overlapped(
    recordings: list[Recording],
    operations: list[str],
    alone_us: float,
    phases: Json,
    wire_us: float | None,
) -> Json:
    """What operations with a chain of ``alone_us`` in each add to chain and phases, and to which
    share of the transfer this amounts; how much longer the chains take.

    Where no transfer was recorded, ``wire_us`` is what one takes at the rate of the copy engines.
    """
    pairs = [(f"{o}_send", f"{o}_recv") for o in operations]
    together = [sum(r.between_us(*pair, outer=True) for pair in pairs) for r in recordings]
    slow = [max(r.between_us(*pair, outer=False) for pair in pairs) / alone_us for r in recordings]
    transfers = [[r.transfer_us(o) for o in operations] for r in recordings]
    known = [sum(t) for t in transfers if None not in t]  # type: ignore[arg-type]
    entry: Json = {"together": summary(together), "slow_down": summary(slow)}
    phases_us = sum(phases[phase]["p50"] for pair in pairs for phase in pair)
    exposed_us = entry["together"]["p50"] - alone_us * len(pairs) - phases_us
    entry |= {"phases_us": round(phases_us, 2), "exposed_us": round(exposed_us, 2)}
    if known:
        entry["transfer"] = summary(known)
    transfer_us = entry["transfer"]["p50"] if known else wire_us and wire_us * len(pairs)
    if transfer_us:
        entry |= {
            "transfer_us": round(transfer_us, 2),
            "hidden": round(1 - exposed_us / transfer_us, 4),
        }
    return entry


@contextlib.contextmanager
def opened(case: Case, scale: Scale, **options: Any) -> Iterator[Library]:
    library = Library(case, scale, **options)
    with library.group:
        yield library
        library.group.check()
