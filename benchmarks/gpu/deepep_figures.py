# SPDX-License-Identifier: Apache-2.0
"""What is compared with DeepEP V1: where our times stand, and how its tests print theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from benchmarks.gpu.measures import DEFAULT
from benchmarks.gpu.trace import KERNELS
from benchmarks.report import Row, find
from benchmarks.results import Json

INTRANODE, LOW_LATENCY = "test_intranode.py", "test_low_latency.py"
FP8 = "dispatch, fp8 values and scales"
PHASES = {name.replace("_", " "): ("phases", name) for name in KERNELS}
# By test of DeepEP: what is compared, and where our times stand under a mover.
COMPARED: dict[str, dict[str, tuple[str, ...]]] = {
    INTRANODE: {
        "dispatch, bf16": ("native", "dispatch"),
        FP8: ("fp8", "kept"),
        "combine": ("native", "combine"),
    },
    LOW_LATENCY: {
        "dispatch, bf16": ("native", "dispatch", "on_device"),
        FP8: ("fp8", "kept", "on_device"),
        "combine": ("native", "combine", "on_device"),
        "dispatch and combine": ("native", "round_trip", "on_device"),
        **PHASES,
        "four phases": ("phases", "total"),
    },
}

_US, _GB_S = r"(?P<us>[\d.]+)", r"(?P<gb_s>[\d.]+) GB/s"
_BEST = rf": SMs (?P<sms>\d+), NVL chunk \d+[,:] {_GB_S} \(NVL\), t: {_US} us"
_RANGE = r"min_t=(?P<min_us>[\d.]+) us, max_t=(?P<max_us>[\d.]+) us"
PRINTED: dict[str, dict[str, str]] = {
    INTRANODE: {
        "dispatch, bf16": r"Best dispatch \(BF16\)" + _BEST,
        FP8: r"Best dispatch \(FP8\)" + _BEST,
        "combine": "Best combine" + _BEST,
    },
    LOW_LATENCY: {
        FP8: rf"Dispatch bandwidth: {_GB_S}, avg_t={_US} us",
        "combine": rf"\| Combine bandwidth: {_GB_S}, avg_t={_US} us",
        "dispatch and combine": (
            rf"Dispatch \+ combine bandwidth: {_GB_S}, avg_t={_US} us, {_RANGE}"
        ),
        "dispatch send": rf"Dispatch send/recv time: {_US} \+",
        "dispatch recv": rf"Dispatch send/recv time: [\d.]+ \+ {_US} us",
        "combine send": rf"Combine send/recv time: {_US} \+",
        "combine recv": rf"Combine send/recv time: [\d.]+ \+ {_US} us",
    },
}


def figures(patterns: Mapping[str, str], text: str) -> Json:
    """What a test has printed: of every pattern the numbers of the slowest rank."""
    found: Json = {}
    for what, pattern in patterns.items():
        ranks = [match.groupdict() for match in re.finditer(pattern, text)]
        if ranks:
            slowest = max(ranks, key=lambda rank: float(rank["us"]))
            found[what] = {name: float(value) for name, value in slowest.items()}
    if missing := [what for what in patterns if what not in found]:
        found["error"] = f"the test has not printed {'; '.join(missing)}"
    return found


def times(run: Json, shapes: Mapping[str, str]) -> Iterator[Row]:
    """Microseconds of what is compared: of a run of ours, or of one of DeepEP's tests."""
    for test, shape in shapes.items():
        theirs = find(run, test) or {}
        for what, path in COMPARED[test].items():
            ours = find(run, "shapes", shape, "movers", DEFAULT, *path, "p50")
            value = ours or find(theirs, what, "us")
            if value:
                yield shape, what, value
        if set(PHASES) <= set(theirs):
            yield shape, "four phases", sum(theirs[phase]["us"] for phase in PHASES)
