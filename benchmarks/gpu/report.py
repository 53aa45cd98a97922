# SPDX-License-Identifier: Apache-2.0
"""The results of ``operations`` as Markdown, and what is compared with the targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.gpu.cases import SHAPES
from benchmarks.gpu.measures import COPY_ENGINE, DEFAULT, SM_PUSH
from benchmarks.gpu.trace import KERNELS
from benchmarks.report import errors, find, machine_line, ms, not_measured, number, table
from benchmarks.results import Json

CALLS = ("dispatch", "combine", "round_trip")
_ROUND_TRIP = ("native", "round_trip", "on_device")


def overlap_entries(shape: Json, kind: str) -> list[Json]:
    """The overlap that the targets speak of: rows moved by copy engines."""
    found = (find(shape, "movers", name, "overlap", kind) for name in (COPY_ENGINE, DEFAULT))
    return next(filter(None, found), [])


def _calls(shape: Json) -> Iterator[list[str]]:
    for name, mover in shape["movers"].items():
        native = mover.get("native", {})
        row = [f"jax_smfree, {name}", *(ms(native.get(call)) for call in CALLS)]
        row += [ms(find(native, call, "on_device")) for call in CALLS[:2]]
        for call in CALLS[:2]:
            wire, logical = (find(native, call, f"{kind}_gb_s") for kind in ("wire", "logical"))
            row.append(f"{number(wire, 0)} / {number(logical, 0)}")
        yield row
        for kind, took in mover.get("fp8", {}).items():
            on_device = ms(find(took, "on_device"))
            yield [f"jax_smfree, {name}, fp8 {kind}", ms(took), "", "", on_device, "", "", ""]
    for name, peer in shape["peers"].items():
        row = [name, *(ms(peer.get(call)) for call in CALLS), "", ""]
        for call in CALLS[:2]:
            took = find(peer, call, "p50")
            logical = shape["logical_bytes"] / took / 1e3 if took else None
            row.append(f"– / {number(logical, 0)}")
        yield row


def _phases(shape: Json) -> Iterator[list[str]]:
    for name, mover in shape["movers"].items():
        for phase in (*KERNELS, "total"):
            found = find(mover, "phases", phase)
            if found:
                spread = f"{found['p50']:.1f} ({found['p10']:.1f}–{found['p90']:.1f})"
                yield [name, phase, spread, f"{found['floor_us']:.1f}", f"{found['ratio']:.2f}"]


def _overlap(shape: Json) -> Iterator[list[str]]:
    for name, mover in shape["movers"].items():
        for kind in ("dispatch", "both"):
            for entry in find(mover, "overlap", kind) or []:
                yield [
                    name,
                    f"{kind}, {entry['gemms']} GEMM" + "s" * (entry["gemms"] > 1),
                    number(entry["alone_us"], 3, 1e-3),
                    ms(entry["together"]),
                    number(entry.get("phases_us"), 3, 1e-3),
                    number(entry.get("exposed_us"), 3, 1e-3),
                    number(entry.get("transfer_us"), 3, 1e-3),
                    number(entry.get("hidden"), 1, 100),
                    number(find(entry, "slow_down", "p50"), 3),
                ]


def _layers(result: Json) -> Iterator[list[str]]:
    for name, shape in result["shapes"].items():
        training, moe = shape.get("training", {}), shape.get("moe", {})
        yield [
            name,
            number(training.get("left_per_direction_us"), 3, 1e-3),
            *(ms(training.get(f"{direction}_phases")) for direction in ("forward", "backward")),
            ms(moe.get("jax_smfree")),
            ms(moe.get("all_gather")),
            number(moe.get("speed_up")),
        ]


def _crossover(result: Json) -> Iterator[list[str]]:
    for entry in find(result, "crossover", "dispatch") or []:
        times = (entry[name] for name in (COPY_ENGINE, SM_PUSH))
        yield [
            str(entry["rows"]),
            f"{entry['message_bytes'] / 2**20:.2f}",
            *(f"{t['p50']:.1f} ({t['p10']:.1f}–{t['p90']:.1f})" for t in times),
        ]


def _ceilings(result: Json) -> Iterator[str]:
    copy, links = result.get("copy_rate", {}), result.get("link_ceilings", {})
    rates = ", ".join(f"{n} {number(find(copy, n, 'gb_s'), 0)}" for n in ("copy", "negate"))
    yield f"- memory, GB/s read plus written: {rates} (XLA); "
    yield f"  {number(links.get('local_copy_gb_s'), 0)} (CUDA kernel)"
    gemms = result.get("gemms", {})
    size, rate, took = gemms.get("size"), gemms.get("tflop_s"), find(gemms, "1", "p50")
    yield f"- GEMM {size}³ bfloat16: {number(took, 0)} µs, {number(rate, 0)} TFLOP/s"
    yield f"- an empty program: {number(find(result, 'launch', 'p50'), 0)} µs"
    messages = {"large": links.get("large"), **links.get("by_shape", {})}
    for name, found in messages.items():
        if found:
            yield (
                f"- {name}, messages of {found['bytes'] / 2**20:.1f} MiB: copy engine "
                f"{found['pair']:.0f} GB/s a pair both ways, {found['all_to_all']:.0f} all to all; "
                f"SM push all to all {found['sm_push']:.0f}"
            )
    yield ""


def lines(result: Json) -> Iterator[str]:
    machine = result["machine"]
    yield from (f"# {result.get('ranks')} × {machine['device']}", "")
    yield from (f"{machine_line(machine, result['ranks'])}; {result['took_s']:.0f} s", "")
    yield from _ceilings(result)
    for name, shape in result["shapes"].items():
        yield f"## {name}, {shape['rows']} rows × {shape['hidden']} {shape['dtype']} per rank"
        yield ""
        yield "Milliseconds, median (10th–90th percentile of batches of calls back to back). On"
        yield "device: first block to last, one call at a time. GB/s: without and with the rows"
        yield "that stay on their rank."
        yield ""
        head = ["", "dispatch", "combine", "round trip", "dispatch on device"]
        head += ["combine on device", "dispatch GB/s", "combine GB/s"]
        yield from table(head, _calls(shape))
        phases = list(_phases(shape))
        if phases:
            yield "Phases on the compute stream, rows long arrived; floor: their bytes at the copy"
            yield "rate above."
            yield ""
            yield from table(["mover", "phase", "µs", "floor µs", "× floor"], phases)
        overlap = list(_overlap(shape))
        if overlap:
            yield "Rows moving under GEMMs, in device time: together, from the send's first block"
            yield "to the recv's last; exposed = together − GEMMs alone − phases; hidden = 1 −"
            yield "exposed / transfer; slow-down: from the send's end to the recv's begin over the"
            yield "GEMMs alone, which are timed between a recv and a send, where no rows move."
            yield ""
            head = ["mover", "around", "GEMMs alone ms", "together ms", "phases ms", "exposed ms"]
            yield from table([*head, "transfer ms", "hidden %", "slow-down"], overlap)
    yield "## Forward and backward"
    yield ""
    yield "Left: milliseconds per direction that dispatch and combine add to GEMMs enough to hide"
    yield "behind; of these the phases. Then the step of a whole MoE layer."
    yield ""
    head = ["shape", "left ms", "phases forward ms", "phases backward ms", "layer jax_smfree ms"]
    yield from table([*head, "layer all_gather ms", "×"], _layers(result))
    crossover = list(_crossover(result))
    if crossover:
        yield from ("## SM push or copy engine", "")
        yield f"A dispatch of N×{result['crossover']['shape']}, first block to last, in µs."
        yield ""
        yield from table(["rows", "MiB per message", COPY_ENGINE, SM_PUSH], crossover)
    yield from not_measured(errors(result))
    yield from ("## Targets", "", *verdict(result))


class Headline(NamedTuple):
    """One of the numbers that the library is judged by.

    Attributes:
      what: it is, with its unit.
      limits: the target by number of GPUs.
      at_least: whether more is better.
    """

    what: str
    value: float | None
    digits: int = 2
    limits: dict[int, float] | None = None
    at_least: bool = False

    def target(self, ranks: int) -> str:
        limit = (self.limits or {}).get(ranks)
        return "" if limit is None else f"{'≥' if self.at_least else '≤'} {limit:g}"

    def verdict(self, ranks: int) -> str:
        limit = (self.limits or {}).get(ranks)
        if limit is None or self.value is None:
            return ""
        return "met" if (self.value >= limit) == self.at_least or self.value == limit else "missed"


def headlines(result: Json) -> Iterator[Headline]:
    """Of the first shape, and of few rows: the same ones in every run, or without a value."""
    names = list(result["shapes"])
    shape, few = result["shapes"][names[0]], result["shapes"].get(SHAPES[-1])

    def scaled(scale: float, place: Json | None, *keys: str) -> float | None:
        value = find(place, *keys)
        return None if value is None else value * scale

    native = find(shape, "movers", DEFAULT, "native")
    yield Headline("dispatch, ms", scaled(1e-3, native, "dispatch", "p50"), 3, {2: 0.5, 4: 1.05})
    yield Headline("combine, ms", scaled(1e-3, native, "combine", "p50"), 3, {2: 0.47, 4: 1.0})
    yield Headline("dispatch and combine, ms", scaled(1e-3, native, "round_trip", "p50"), 3)
    kept = scaled(1e-3, find(shape, "movers", DEFAULT, "fp8"), "kept", "p50")
    yield Headline("fp8 dispatch into values and scales, ms", kept, 3, {2: 0.3})
    rows = scaled(1e-3, find(shape, "movers", DEFAULT, "fp8"), "rows", "p50")
    yield Headline("fp8 dispatch into rows, ms", rows, 3)
    phases = find(shape, "movers", DEFAULT, "phases")
    for name in KERNELS:
        yield Headline(f"{name} over its byte floor", find(phases, name, "ratio"))
    yield Headline("four phases, ms", scaled(1e-3, phases, "total", "p50"), 3)
    limits = {2: 1.15, 4: 1.15}
    yield Headline("four phases over their byte floor", find(phases, "total", "ratio"), 2, limits)
    for kind in ("dispatch", "both"):
        hidden = [100 * e["hidden"] for e in overlap_entries(shape, kind) if "hidden" in e]
        what = f"transfer hidden under GEMMs around {kind}, %, best"
        yield Headline(what, max(hidden, default=None), 1, {2: 97, 4: 97}, at_least=True)
    slow = [e["slow_down"]["p50"] for e in overlap_entries(shape, "both") if "slow_down" in e]
    yield Headline("GEMMs under rows that move, ×, worst", max(slow, default=None), 3, {2: 1.02})
    yield Headline("wire rate, % of copies alone", _wire_share(result, shape), 1, {4: 95}, True)
    left = scaled(1e-3, shape, "training", "left_per_direction_us")
    yield Headline("left per direction of a training step, ms", left, 3, {4: 1.1})
    moe = find(shape, "moe", "speed_up")
    yield Headline("MoE layer, × all_gather", moe, 2, {2: 1.4}, at_least=True)
    if few:
        rows, mover = f"{few['rows']} rows", find(few, "movers", DEFAULT)
        total, whole = (find(mover, *k, "p50") for k in (("phases", "total"), _ROUND_TRIP))
        yield Headline(f"{rows}: four phases, µs", total, 1, {2: 40})
        yield Headline(f"{rows}: dispatch and combine on the device, µs", whole, 1, {2: 45})


def _wire_share(result: Json, shape: Json) -> float | None:
    """The rate of the transfers over that of the copy engines alone, where both were measured."""
    limit = find(result, "link_ceilings", "large", "all_to_all")
    transfer = [e["transfer"]["p50"] for e in overlap_entries(shape, "dispatch") if "transfer" in e]
    if not limit or not transfer:
        return None
    return float(100 * shape["wire_bytes"] / min(transfer) / 1e3 / limit)


def targets_for(result: Json) -> int:
    """The number of GPUs whose targets these results are compared with; 0 where there are none."""
    comparable = next(iter(result["shapes"])) == SHAPES[0] and "H200" in result["machine"]["device"]
    return int(result["ranks"]) if comparable else 0


def verdict(result: Json) -> Iterator[str]:
    ranks = targets_for(result)
    name = next(iter(result["shapes"]))
    yield from (f"{name}; the targets are for {SHAPES[0]} on 2 and 4 H200.", "")
    rows = (
        [h.what, h.target(ranks), number(h.value, h.digits), h.verdict(ranks)]
        for h in headlines(result)
    )
    yield from table(["", "target", "measured", ""], rows)
