# SPDX-License-Identifier: Apache-2.0
"""The results as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from jax_smfree.bench.cases import FLOOR, LAUNCH, LIBRARY, PEERS, PHASES

Case = dict[str, Any]

LEGEND = """\
Medians in microseconds, all ranks at the same time, on all cores; the columns are timed in turn.
  d.send … c.recv  the four phases, each a program of its own; no waiting for peers is in them
  launch           starting a program that does nothing; it is in every other number
  round trip       dispatch and combine, native mode, one program; with the 10th and 90th percentile
  x floor          round trip over a plain memcpy of the bytes that two-phase dispatch and combine
                   must at least read and write, by all cores, with warm pages
  GB/s             these bytes over the round trip
  all_gather …     the round trip in other JAX ways, same rows, same capacity
  best/ours        the fastest of them over ours"""


def best_peer(case: Case, statistic: str = "median") -> float:
    return min(case["times_us"][name][statistic] for name in PEERS)


def speedup(case: Case) -> float:
    return best_peer(case) / case["times_us"][LIBRARY]["median"]


def group_of(case: Case) -> tuple[Any, ...]:
    return case["hidden"], case["dtype"], case["top_k"], case["experts"]


def _row(case: Case) -> list[str]:
    times = case["times_us"]
    mine = times[LIBRARY]
    ranks = f"{case['ranks']}" + (f" ({case['processes']} proc.)" if case["processes"] > 1 else "")
    return [
        ranks,
        f"{case['rows']}",
        *(f"{times[phase]['median']:.0f}" for phase in PHASES),
        f"{times[LAUNCH]['median']:.0f}",
        f"{mine['median']:.0f} ({mine['p10']:.0f}-{mine['p90']:.0f})",
        f"{mine['median'] / times[FLOOR]['median']:.2f}",
        f"{sum(case['bytes'].values()) / mine['median'] / 1e3:.1f}",
        *(f"{times[peer]['median']:.0f}" for peer in PEERS),
        f"{speedup(case):.2f}",
    ]


def lines(result: dict[str, Any]) -> Iterator[str]:
    machine = result["machine"]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"Python {machine['python']}, jax {machine['jax']}, commit {machine['commit']}, "
        f"{machine['date']}, load {machine['load_average'][0]}"
    )
    yield LEGEND
    head = ["ranks", "rows/rank", "d.send", "d.recv", "c.send", "c.recv", "launch"]
    head += ["round trip (p10-p90)", "x floor", "GB/s", *PEERS, "best/ours"]
    cases = sorted(result["cases"], key=lambda c: (group_of(c)[1:], c["rows"], c["ranks"]))
    for (hidden, dtype, top_k, experts), group in itertools.groupby(cases, group_of):
        rows = [head, *map(_row, group)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield ""
        yield f"hidden {hidden} {dtype}, top-{top_k} of {experts}"
        for row in rows:
            yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    yield ""
    error = result["ragged_all_to_all"]
    yield f"ragged_all_to_all: {'not measured' if error is None else error}"
    large = [c for c in result["cases"] if c["rows"] >= 1024]
    if large:
        faster = sum(speedup(c) >= 1 for c in large)
        yield (
            f"1,024 rows per rank and more: at least as fast as the best JAX way in {faster} of "
            f"{len(large)} shapes; best/ours from {min(map(speedup, large)):.2f} to "
            f"{max(map(speedup, large)):.2f}"
        )
