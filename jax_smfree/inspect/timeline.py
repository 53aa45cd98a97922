# SPDX-License-Identifier: Apache-2.0
"""What ran when on the GPUs of a group: its phases, and the copies of its movers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from jax_smfree._src import arguments

Record = dict[str, Any]

# The GPUs' clocks are taken for one if their first records are not further apart.
_MAX_SKEW_NS = 1_000_000
# Ranks, peers and replicas are below the first, times below the second.
_MOST = (2**31, 2**63)
PHASES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
_PHASE_KEYS = frozenset(["rank", "phase", "begin_ns", "end_ns"])
_WIRE_KEYS = frozenset(["rank", "peer", "begin_ns", "end_ns"])


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Phases and copies of one group, as it recorded them.

    Attributes:
      phases: ``group.trace()``.
      wire: ``group.end_wire_trace()``; may be empty.

    Raises:
      ValueError, TypeError: for records that are not such.

    Example:
      >>> phase = {"rank": 0, "phase": "dispatch_send", "begin_ns": 1000, "end_ns": 3000}
      >>> timeline = smfree.inspect.Timeline([phase])
      >>> timeline.span_us(phase)
      (0.0, 2.0)
    """

    phases: list[Record]
    wire: list[Record] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        for kind, records, keys in (
            ("phases", self.phases, _PHASE_KEYS),
            ("wire", self.wire, _WIRE_KEYS),
        ):
            if not isinstance(records, list | tuple):
                raise TypeError(
                    f"Timeline: got {kind}={arguments.shown(records)}, expected a list of records, "
                    "as group.trace() and group.end_wire_trace() return them."
                )
            for record in records:
                _check(kind, record, keys)
        if not self.phases:
            raise ValueError(
                "Timeline: got no phases, expected those of group.trace() after a program has run "
                "on GPUs. (Groups of CPU devices record none.)"
            )

    @classmethod
    def from_json(cls, value: Any) -> Timeline:
        """From ``{"phases": group.trace(), "wire": group.end_wire_trace()}``.

        Raises:
          ValueError: for anything else.
        """
        given = value if isinstance(value, Mapping) else {}
        phases, wire = given.get("phases"), given.get("wire", [])
        if not isinstance(phases, list) or not isinstance(wire, list):
            raise ValueError(
                "Timeline: got a JSON value without a list 'phases', expected "
                '{"phases": group.trace(), "wire": group.end_wire_trace()}.'
            )
        return cls(list(phases), list(wire))

    @property
    def ranks(self) -> list[tuple[int, int]]:
        """(replica, rank) of all that took part."""
        return sorted({rank_of(p) for p in self.phases})

    @property
    def has_one_clock(self) -> bool:
        """Whether times of different ranks compare; else each rank's count from its own start."""
        begins = self._begins.values()
        return max(begins) - min(begins) < _MAX_SKEW_NS

    def span_us(self, record: Record) -> tuple[float, float]:
        """Begin and duration of a record of this timeline, in microseconds."""
        begins = self._begins
        zero = min(begins.values()) if self.has_one_clock else begins[rank_of(record)]
        return (record["begin_ns"] - zero) / 1e3, (record["end_ns"] - record["begin_ns"]) / 1e3

    def trace_events(self) -> dict[str, Any]:
        """The JSON value that https://ui.perfetto.dev and chrome://tracing open.

        A process is a rank; its first thread is the compute stream, the others are copies to peers.
        """
        return {"traceEvents": list(self._events()), "displayTimeUnit": "ms"}

    def _events(self) -> Iterator[Record]:
        for process, rank in enumerate(self.ranks):
            phases = [p for p in self.phases if rank_of(p) == rank]
            wire = [w for w in self.wire if rank_of(w) == rank]
            yield _name("process_name", process, 0, "replica {}, rank {}".format(*rank))
            yield _name("thread_name", process, 0, "compute stream")
            for peer in sorted({w["peer"] for w in wire}):
                yield _name("thread_name", process, 1 + peer, f"copies to rank {peer}")
            for phase in phases:
                yield self._slice(phase, phase["phase"], process, 0)
            for copy in wire:
                yield self._slice(copy, f"copy to rank {copy['peer']}", process, 1 + copy["peer"])

    def _slice(self, record: Record, name: str, process: int, thread: int) -> Record:
        begin, duration = self.span_us(record)
        place = {"pid": process, "tid": thread, "ts": begin, "dur": duration}
        return {"name": name, "ph": "X", **place, "args": record}

    @functools.cached_property
    def _begins(self) -> dict[tuple[int, int], int]:
        begins: dict[tuple[int, int], int] = {}
        for phase in self.phases:
            rank = rank_of(phase)
            begins[rank] = min(begins.get(rank, phase["begin_ns"]), phase["begin_ns"])
        return begins


def rank_of(record: Record) -> tuple[int, int]:
    """(replica, rank) of a record."""
    return record.get("replica", 0), record["rank"]


def _check(kind: str, record: Any, keys: frozenset[str]) -> None:
    expected = "expected those of group.trace() and group.end_wire_trace()."
    if not isinstance(record, Mapping):
        raise ValueError(
            f"Timeline: got {arguments.shown(record)} as a record of {kind}, {expected}"
        )
    if missing := keys - record.keys():
        raise ValueError(f"Timeline: got a record of {kind} without {sorted(missing)}, {expected}")
    for name in (keys | {"replica"}) & record.keys():
        value = record[name]
        if name == "phase":
            right = value in PHASES
        else:
            right = isinstance(value, int) and 0 <= value < _MOST[name.endswith("_ns")]
        if not right:
            raise ValueError(
                f"Timeline: got {name}={arguments.shown(value)} in a record of {kind}, {expected}"
            )
    if record["end_ns"] < record["begin_ns"]:
        raise ValueError(f"Timeline: got a record of {kind} that ends before it begins, {expected}")


def _name(kind: str, process: int, thread: int, name: str) -> Record:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
