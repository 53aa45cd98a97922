# SPDX-License-Identifier: Apache-2.0
"""The results as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.report import machine_line, table
from benchmarks.results import Json
from jax_smfree.bench.cases import FLOOR, LAUNCH, LIBRARY, PEERS, PHASES

LEGEND = """\
Medians in microseconds, all ranks at the same time, on all cores; the columns are timed in turn.
*dispatch send* to *combine recv*: the phases, each a program of its own; no waiting for peers is in
them. *launch*: starting a program that does nothing; it is in every other number. *round trip*:
dispatch and combine, native mode, one program, with the 10th and 90th percentile. *× floor*: the
round trip over a plain memcpy of the bytes that two-phase dispatch and combine must at least read
and write, by all cores, with warm pages. *GB/s*: these bytes over the round trip. *all_gather* and
on: the round trip in other JAX ways, same rows, same capacity. *best/ours*: the fastest of them
over ours."""
HEAD = ("ranks", "rows", *PHASES, LAUNCH, "round trip", "× floor", "GB/s", *PEERS, "best/ours")


def speedup(case: Json) -> float:
    times = case["times_us"]
    best = min(times[name]["median"] for name in PEERS)
    return float(best / times[LIBRARY]["median"])


def _group_of(case: Json) -> tuple[int, str, int, int]:
    return case["hidden"], case["dtype"], case["top_k"], case["experts"]


def _row(case: Json) -> list[str]:
    times = case["times_us"]
    mine = times[LIBRARY]
    processes = case["processes"]
    return [
        f"{case['ranks']}" + (f" ({processes} processes)" if processes > 1 else ""),
        f"{case['rows']}",
        *(f"{times[name]['median']:.0f}" for name in (*PHASES, LAUNCH)),
        f"{mine['median']:.0f} ({mine['p10']:.0f}–{mine['p90']:.0f})",
        f"{mine['median'] / times[FLOOR]['median']:.2f}",
        f"{sum(case['bytes'].values()) / mine['median'] / 1e3:.1f}",
        *(f"{times[peer]['median']:.0f}" for peer in PEERS),
        f"{speedup(case):.2f}",
    ]


def lines(result: Json) -> Iterator[str]:
    machine = result["machine"]
    yield from (f"# {machine['cores']} cores of {machine['cpu']}", "", machine_line(machine), "")
    yield from (LEGEND, "")
    cases = sorted(result["cases"], key=lambda c: (_group_of(c)[1:], c["rows"], c["ranks"]))
    for (hidden, dtype, top_k, experts), group in itertools.groupby(cases, _group_of):
        yield from (f"## Hidden {hidden}, {dtype}, top-{top_k} of {experts}", "")
        yield from table(HEAD, map(_row, group))
    error = result["ragged_all_to_all"]
    yield f"`ragged_all_to_all`: {'not measured' if error is None else error}"
    large = [speedup(case) for case in cases if case["rows"] >= 1024]
    if large:
        yield ""
        yield (
            f"1,024 rows per rank and more: at least as fast as the best JAX way in "
            f"{sum(s >= 1 for s in large)} of {len(large)} shapes; best/ours from {min(large):.2f} "
            f"to {max(large):.2f}"
        )
