# SPDX-License-Identifier: Apache-2.0
"""A program kernel by kernel, on the first GPU, from JAX's profiler."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.timing import Run
from benchmarks.report import number
from benchmarks.results import Json

CALLS = 5  # back to back
# By name and types of arguments; the first that fits. The last one fits all.
GROUPS = {
    "grouped matmul, dw": r"grouped_outer_product",
    "grouped matmul, dx": r"grouped_matmul_transposed",
    "grouped matmul, forward": r"grouped_matmul",
    "combine send": r"smfree.*\bCombineSendArrays\b",
    "combine recv": r"smfree.*\bCombineRecvArrays\b",
    "dispatch recv": r"smfree.*\b(Place|Mark|Scatter|PlaceAndScatter)\b",
    "dispatch send": r"smfree.*\b(Route|PlaceOnWire|LayOut|Pack|RouteAndPack)\b",
    "dense matmuls": r"gemm|nvjet|cutlass|xmma|cublas",
    "fusions of XLA": r"fusion|^wrapped_|^loop_|^input_",
    "everything else": "",
}
COPIES = "copies and fills"  # by copy engines, beside kernels
MOST_NAMES = 4  # of a group, in a table
HEADER = ("", "launches", "µs", "share", "kernels, the longest first")


def measure(into: Json, run: Run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level = options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(CALLS):
                result = run()
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        into.update(of_profile(jax.profiler.ProfileData.from_file(str(path)), CALLS))
    if not into and jax.devices()[0].platform == "gpu":
        raise RuntimeError("JAX's profiler saw no GPU: it needs the library CUPTI of CUDA")


def of_profile(profile: Any, calls: int) -> Json:
    """What ran on the first GPU, per call; {} where a profile has no GPU."""
    planes = sorted(p.name for p in profile.planes if p.name.startswith("/device:GPU:"))
    if not planes:
        return {}
    lines = [line for line in profile.find_plane_with_name(planes[0]).lines]
    streams = [line for line in lines if line.name.startswith("Stream")]
    spans: list[tuple[float, float]] = []  # of kernels
    groups: dict[str, Json] = {}
    for event in (event for stream in streams for event in stream.events):
        name = _group(event.name)
        if name != COPIES:
            spans.append((event.start_ns, event.start_ns + event.duration_ns))
        group = groups.setdefault(name, {"us": 0.0, "launches": 0.0, "kernels": {}})
        us, kernel = event.duration_ns / 1e3 / calls, _short(event.name)
        group["us"] += us
        group["launches"] += 1 / calls
        group["kernels"][kernel] = group["kernels"].get(kernel, 0.0) + us
    if not spans:
        raise RuntimeError(f"the profiler saw no kernel, of {[line.name for line in lines]}")
    for group in groups.values():
        by_time = sorted(group["kernels"].items(), key=lambda each: -each[1])
        group["kernels"] = {kernel: round(us, 2) for kernel, us in by_time}
        group["us"], group["launches"] = round(group["us"], 2), round(group["launches"], 2)
    step_ns, gap_ns = _step_and_gap(sorted(spans))
    step = {"step_us": round(step_ns / 1e3 / calls, 2), "gap_us": round(gap_ns / 1e3 / calls, 2)}
    return {**step, "groups": {name: groups[name] for name in (*GROUPS, COPIES) if name in groups}}


def rows(found: Json) -> Iterator[list[str]]:
    """Of a table, under `HEADER`."""
    step = found["step_us"]

    def row(name: str, launches: str, us: float, names: str = "") -> list[str]:
        return [name, launches, number(us, 0), f"{us / step:.1%}", names]

    for name, group in found["groups"].items():
        kernels = [f"`{kernel}`" for kernel in list(group["kernels"])[:MOST_NAMES]]
        if len(group["kernels"]) > MOST_NAMES:
            kernels.append("…")
        yield row(name, number(group["launches"], 1), group["us"], ", ".join(kernels))
    yield row("no kernel runs", "", found["gap_us"])
    yield row("the step", "", step)


def _group(name: str) -> str:
    if re.match("Mem(cpy|set)", name):
        return COPIES
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name))


def _short(name: str) -> str:
    """Without types and namespaces."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].rpartition("::")[2]


def _step_and_gap(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """From the first begin to the last end, and how much of that is in none of them."""
    (begin, end), gap = spans[0], 0.0
    for first, last in spans:
        gap += max(0.0, first - end)
        end = max(end, last)
    return end - begin, gap
