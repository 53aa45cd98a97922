# SPDX-License-Identifier: Apache-2.0
"""Reads what the library records about its own kernels and copies."""

from __future__ import annotations

from typing import Any

import jax

import jax_smfree as smfree
from benchmarks.gpu.timing import Run

Record = dict[str, Any]
KERNELS = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")


def duration_us(record: Record) -> float:
    return (record["end_ns"] - record["begin_ns"]) / 1e3


class Recording:
    """The newest record of every phase: of a program with at most one operation of each kind."""

    def __init__(self, records: list[Record], wire: list[Record]) -> None:
        records = sorted(records, key=lambda r: r["number"])
        self._phases = {(r["rank"], r["mirrored"], r["phase"]): r for r in records}
        self.ranks = sorted({rank for rank, _, _ in self._phases})
        forward = [r for r in self._phases.values() if not r["mirrored"]]
        numbers = {(r["rank"], r["lane"], r["number"]) for r in forward}
        self.wire = [
            w for w in wire if not w["mirrored"] and (w["rank"], w["lane"], w["number"]) in numbers
        ]

    def phases(self, name: str, mirrored: bool = False) -> list[Record]:
        """One of each rank that has it, by rank."""
        found = (self._phases.get((rank, mirrored, name)) for rank in self.ranks)
        return [record for record in found if record]

    def slowest_us(self, name: str) -> float:
        return max(map(duration_us, self.phases(name)))

    def total_us(self, mirrored: bool) -> float:
        """All phases of a direction, at the rank that they take longest on."""
        per_rank = dict.fromkeys(self.ranks, 0.0)
        for (rank, direction, _), record in self._phases.items():
            if direction == mirrored:
                per_rank[rank] += duration_us(record)
        return max(per_rank.values())

    def between_us(self, first: str, last: str, *, outer: bool) -> float:
        """From one phase to a later one, both counted (``outer``) or neither; the slowest rank."""
        pairs = zip(self.phases(first), self.phases(last), strict=True)
        begin, end = ("begin_ns", "end_ns") if outer else ("end_ns", "begin_ns")
        return max((b[end] - a[begin]) / 1e3 for a, b in pairs)

    def transfer_us(self, operation: str) -> float | None:
        """First byte to last byte on the wire, at the slowest rank; None if nobody recorded it."""
        times = []
        for send in self.phases(f"{operation}_send"):
            mine = [
                w
                for w in self.wire
                if all(w[key] == send[key] for key in ("rank", "lane", "number"))
            ]
            if mine:
                first, last = min(w["begin_ns"] for w in mine), max(w["end_ns"] for w in mine)
                times.append((last - first) / 1e3)
        return max(times, default=None)

    def to_json(self) -> dict[str, list[Record]]:
        return {"phases": list(self._phases.values()), "wire": self.wire}


class Tracer:
    """Runs a program and returns what its phases did. Works where groups have traces."""

    def __init__(self, group: smfree.EpGroup) -> None:
        self._group = group
        self._seen: dict[tuple[int, int, bool], int] = {}  # the last number on each lane

    def _news(self) -> list[Record]:
        """What was recorded since the last call."""
        news, seen = [], dict(self._seen)
        for record in self._group.trace():
            lane = record["rank"], record["lane"], record["mirrored"]
            if record["number"] > self._seen.get(lane, -1):
                news.append(record)
                seen[lane] = max(seen.get(lane, -1), record["number"])
        self._seen = seen
        return news

    def __call__(self, run: Run, lead_in: int = 0) -> Recording:
        """Records the last of ``1 + lead_in`` runs back to back."""
        self._news()
        self._group.start_wire_trace()
        for _ in range(lead_in):
            run()
        jax.block_until_ready(run())
        wire = self._group.end_wire_trace()
        news = self._news()
        if not news:
            raise RuntimeError("group.trace() has nothing new after a program of the group")
        return Recording(news, wire)
