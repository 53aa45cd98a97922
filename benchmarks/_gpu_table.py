# SPDX-License-Identifier: Apache-2.0
"""The results as Markdown, and the verdict on the targets. What is missing is a dash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from _gpu_cases import SHAPES
from _gpu_peers import best
from _gpu_timing import Json
from _gpu_trace import KERNELS

CALLS = ("dispatch", "combine", "round_trip")
COPY_ENGINE, DEFAULT = "copy engine", "default"


def find(place: Any, *keys: str) -> Any:
    for key in keys:
        place = place.get(key) if isinstance(place, dict) else None
    return place


def number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def ms(times: Json | None) -> str:
    """Median (10th to 90th percentile) in milliseconds."""
    if not times:
        return "–"
    p50, p10, p90 = (f"{times[p] / 1e3:.3f}" for p in ("p50", "p10", "p90"))
    return f"{p50} ({p10}–{p90})"


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def overlap_entries(shape: Json, kind: str) -> list[Json]:
    """The overlap that the targets speak of."""
    return find(shape, "movers", COPY_ENGINE, "overlap", kind) or []


def _calls(shape: Json) -> Iterator[list[str]]:
    for name, mover in shape["movers"].items():
        native = mover.get("native", {})
        row = [f"jax_smfree, {name}", *(ms(native.get(call)) for call in CALLS)]
        row += [ms(find(native, call, "on_device")) for call in CALLS[:2]]
        for call in CALLS[:2]:
            wire, logical = (find(native, call, f"{kind}_gb_s") for kind in ("wire", "logical"))
            row.append(f"{number(wire, 0)} / {number(logical, 0)}")
        yield row
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
        times = (entry[name] for name in ("copy engine", "SM push"))
        yield [
            str(entry["rows"]),
            f"{entry['message_bytes'] / 2**20:.2f}",
            *(f"{t['p50']:.1f} ({t['p10']:.1f}–{t['p90']:.1f})" for t in times),
        ]


def _errors(place: Any, path: str = "") -> Iterator[str]:
    if isinstance(place, dict):
        for key, value in place.items():
            if key in ("error", "skipped"):
                yield f"- {path}: {key}: {str(value).splitlines()[0]}"
            else:
                yield from _errors(value, f"{path} / {key}" if path else key)


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
    yield f"# {result.get('ranks')} × {machine['device']}"
    yield ""
    yield (
        f"{machine['date']}, commit {machine['commit']}, jax {machine['jax']}, driver "
        f"{machine['gpu'].get('driver_version', '–')}, nvcc {machine['nvcc']}, Python "
        f"{machine['python']}, {machine['cpu']}, {machine['cores']} cores; {result['took_s']:.0f} s"
    )
    yield ""
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
        yield from table(["rows", "MiB per message", "copy engine", "SM push"], crossover)
    errors = list(_errors(result))
    if errors:
        yield from ("## Not measured", "", *errors, "")
    yield from ("## Targets", "", *verdict(result))


def _verdict(result: Json) -> Iterator[tuple[str, str, str, bool | None]]:
    """What, target, measured, met; of the first shape, or all where it says so."""
    shape = next(iter(result["shapes"].values()))
    native = find(shape, "movers", DEFAULT, "native")
    for call, limit in (("dispatch", 1050), ("combine", 1000)):
        took = find(native, call, "p50")
        peer = best(shape["peers"], call)
        versus = f" (best JAX way {peer / 1e3:.2f})" if peer < float("inf") else ""
        met = took <= limit if took else None
        yield f"{call}, native, ms", f"≤ {limit / 1e3:.2f}", number(took, 3, 1e-3) + versus, met

    total = find(shape, "movers", DEFAULT, "phases", "total")
    ratio = find(total, "ratio")
    shown = f"{ratio:.2f} ({total['p50'] / 1e3:.3f} ms)" if ratio else "–"
    yield "four phases over their byte floor", "≤ 1.15", shown, ratio and ratio <= 1.15

    entries = overlap_entries(shape, "both")
    slow = [e["slow_down"]["p50"] for e in entries if "slow_down" in e]
    shown = number(max(slow, default=None), 3)
    yield "GEMM slow-down, worst", "≤ 1.03", shown, max(slow) <= 1.03 if slow else None
    hidden = max((e["hidden"] for e in entries if "hidden" in e), default=None)
    met = hidden >= 0.97 if hidden is not None else None
    yield "transfer hidden, enough compute, %", "≥ 97", number(hidden, 1, 100), met

    left = find(shape, "training", "left_per_direction_us")
    met = left <= 1100 if left is not None else None
    yield "left per direction, ms", "≤ 1.10", number(left, 3, 1e-3), met

    layers = [s["moe"]["speed_up"] for s in result["shapes"].values() if find(s, "moe", "speed_up")]
    first = find(shape, "moe", "speed_up")
    met = first >= 1.3 if first else None
    yield "MoE layer over all_gather, first shape", "≥ 1.3", number(first), met
    met = min(layers) > 1 if layers else None
    yield f"…, worst of {len(layers)} shapes", "> 1", number(min(layers, default=None)), met

    what = "wire rate over the copy engines', %"
    limit = find(result, "link_ceilings", "large", "all_to_all")
    transfer = [e["transfer"]["p50"] for e in overlap_entries(shape, "dispatch") if "transfer" in e]
    whole = find(native, "dispatch", "on_device", "p50") or find(native, "dispatch", "p50")
    if limit and transfer:
        share = shape["wire_bytes"] / min(transfer) / 1e3 / limit
        yield what, "≥ 95", number(share, 1, 100), share >= 0.95
    elif limit and whole:
        # Nobody recorded the transfers: packing and unpacking are in it.
        share = shape["wire_bytes"] / whole / 1e3 / limit
        shown = f"at least {share * 100:.1f}, over the whole dispatch"
        yield what, "≥ 95", shown, True if share >= 0.95 else None
    else:
        yield what, "≥ 95", "–", None


def verdict(result: Json) -> Iterator[str]:
    """Met or missed is said only of what the targets were set for."""
    shape = next(iter(result["shapes"]))
    comparable = (shape, result["ranks"]) == (SHAPES[0], 4) and "H200" in result["machine"][
        "device"
    ]
    words = {True: "met", False: "missed", None: "not measured"}
    yield f"{shape}; the targets are for {SHAPES[0]} on 4 H200."
    yield ""
    rows = (
        [what, aim, got, words[met] if comparable or met is None else "–"]
        for what, aim, got, met in _verdict(result)
    )
    yield from table(["", "target", "measured", ""], rows)
