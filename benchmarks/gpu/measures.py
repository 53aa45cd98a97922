# SPDX-License-Identifier: Apache-2.0
"""What is measured of the library in one case: whole calls, phases, and rows moving under GEMMs.

Every function takes the place that its numbers go into.
"""

from __future__ import annotations

import functools

import jax_smfree as smfree
from benchmarks.gpu import links
from benchmarks.gpu.cases import Case, Scale
from benchmarks.gpu.library import Library
from benchmarks.gpu.timing import GEMM_COUNTS, Gemms, prepare, summary, timed
from benchmarks.gpu.trace import KERNELS, Recording
from benchmarks.results import Json, Session

DEFAULT, COPY_ENGINE, SM_PUSH = "default", "copy engine", "SM push"
# Options of EpConfig by what moves the rows; the default leaves it to the library.
MOVERS: dict[str, Json] = {
    DEFAULT: {"sm_push_bytes": None},
    COPY_ENGINE: {"sm_push_bytes": 0},
    SM_PUSH: {"sm_push_bytes": 2**40},
}


def mover(
    into: Json,
    case: Case,
    scale: Scale,
    session: Session,
    gemms: Gemms,
    with_overlap: bool,
    name: str,
) -> None:
    """One way to move rows. Nothing is timed if the check fails."""
    part, result = session.part, session.result
    with Library(case, scale, **MOVERS[name]) as library:
        into["check"] = {}
        library.check(into["check"])
        part(into, "native", native, library)
        if case.shape.hidden % smfree.Fp8().block == 0:
            part(into, "fp8", fp8, library)
        if library.tracer:
            part(into, "phases", phases, library, gemms, result["copy_rate"]["gb_s"])
        if library.tracer and with_overlap:
            egress = links.egress_gb_s(result["link_ceilings"], case.shape.name)
            part(into, "overlap", overlap, library, gemms, into["phases"], egress)


def native(into: Json, library: Library) -> None:
    """One call that does both phases: dispatch, combine, and one after the other."""
    case = library.case
    runs = prepare(
        case.mesh,
        {
            "dispatch": (library.dispatch, *case.inputs),
            "round_trip": (library.round_trip, *case.inputs),
        },
    )
    runs |= prepare(case.mesh, {"combine": (library.combine, runs["dispatch"]())})
    for name, run in runs.items():
        into[name] = timed(run, library.scale)
        directions = 2 if name == "round_trip" else 1
        for rate, moved in (("wire", case.wire_bytes), ("logical", case.logical_bytes)):
            per_us = directions * moved / into[name]["p50"]
            into[name][f"{rate}_gb_s"] = round(per_us / 1e3, 1)
    library.group.check()
    if library.tracer:
        for name, (first, last) in {
            "dispatch": (KERNELS[0], KERNELS[1]),
            "combine": (KERNELS[2], KERNELS[3]),
            "round_trip": (KERNELS[0], KERNELS[3]),
        }.items():
            times = [r.between_us(first, last, outer=True) for r in library.record(runs[name])]
            into[name]["on_device"] = summary(times)
        into["timeline"] = library.tracer(runs["round_trip"], library.scale.lead_in).to_json()


def fp8(into: Json, library: Library) -> None:
    """Dispatches that are quantised on the wire: into rows as they were given, and kept."""
    library.check_fp8()
    case = library.case
    programs = {"rows": library.dispatch_fp8, "kept": library.dispatch_fp8_kept}
    for name, run in prepare(
        case.mesh, {name: (program, *case.inputs) for name, program in programs.items()}
    ).items():
        into[name] = timed(run, library.scale)
        if library.tracer:
            recordings = library.record(run)
            times = [r.between_us(KERNELS[0], KERNELS[1], outer=True) for r in recordings]
            into[name]["on_device"] = summary(times)
            into[name]["send"] = summary([r.slowest_us(KERNELS[0]) for r in recordings])
    library.group.check()


def phases(into: Json, library: Library, gemms: Gemms, gb_s: float) -> None:
    """The time of each phase where the rows have long arrived: no waiting is in it."""
    program = functools.partial(library.around_both, GEMM_COUNTS[-1])
    arguments = (*library.case.inputs, gemms.a, gemms.w)
    recordings = library.record(prepare(library.case.mesh, {"": (program, *arguments)})[""])
    library.group.check()
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


def overlap(
    into: Json, library: Library, gemms: Gemms, phase_times: Json, egress_gb_s: float | None
) -> None:
    """Chains of GEMMs with rows moving under them: what is left over, and what they suffer.

    All in device time, and in runs of one kind: a GPU that multiplies back to back has another
    clock than one that also unpacks.
    """
    arguments = (*library.case.inputs, gemms.a, gemms.w)
    programs = {
        "apart": library.apart,
        "dispatch": library.around_dispatch,
        "both": library.around_both,
    }
    runs = prepare(
        library.case.mesh,
        {
            f"{name} {count}": (functools.partial(program, count), *arguments)
            for name, program in programs.items()
            for count in GEMM_COUNTS
        },
    )
    wire_us = library.case.wire_bytes / egress_gb_s / 1e3 if egress_gb_s else None
    into.update(dispatch=[], both=[])
    for count in GEMM_COUNTS:
        alone = _gap_us(library.record(runs[f"apart {count}"]), "dispatch_recv", "combine_send")
        for name, operations in (("dispatch", KERNELS[:1]), ("both", KERNELS[::2])):
            recordings = library.record(runs[f"{name} {count}"])
            names = [send.removesuffix("_send") for send in operations]
            entry = {"gemms": count, "alone_us": alone * len(names)}
            entry |= _overlapped(recordings, names, alone, phase_times, wire_us)
            into[name].append(entry)
            if name == "both":
                into["timeline"] = recordings[-1].to_json()
    library.group.check()


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
    phase_times: Json,
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
    phases_us = sum(phase_times[phase]["p50"] for pair in pairs for phase in pair)
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
