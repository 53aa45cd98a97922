# SPDX-License-Identifier: Apache-2.0
"""Test reports: to and from other processes, one out of those of all ranks, and made by hand."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

When = Literal["setup", "call", "teardown"]
PHASES: tuple[When, ...] = ("setup", "call", "teardown")

_MAX_CHARACTERS = 200_000  # of a text between processes; the logs have all of it
_MAX_OTHERS = 4_000  # of what a rank printed that did not cause the outcome

# What a phase can have come to on one rank. The first that any rank has is the outcome of all: a
# crash explains failures elsewhere, a failure explains ranks that wait for the failed one.
_LOST = ("crashed", "hung", "waited")
_ENDED = ("xfailed", "xpassed strict", "skipped", "xpassed", "passed")
_KINDS = ("crashed", "failed", "hung", "waited", *_ENDED)


def to_data(config: pytest.Config, report: pytest.TestReport) -> dict[str, Any]:
    """A report as JSON can carry it, cut to a size that a message can have."""
    report.sections = [(name, text[-_MAX_CHARACTERS:]) for name, text in report.sections]
    text = _to_json(config, report)
    if len(text) > 4 * _MAX_CHARACTERS:
        report.sections = []
        report.longrepr = report.longreprtext[-_MAX_CHARACTERS:]
        text = _to_json(config, report)
    data: dict[str, Any] = json.loads(text)
    return data


def from_data(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    """The inverse of `to_data`."""
    for name in ("location", "longrepr"):  # pytest wants them to be tuples, JSON has only lists
        if isinstance(data[name], list):
            data[name] = tuple(data[name])
    report: pytest.TestReport = config.hook.pytest_report_from_serializable(
        config=config, data=data
    )
    return report


def merge(reports: Sequence[pytest.TestReport]) -> pytest.TestReport:
    """One phase of a test, as it ended on all ranks together.

    A failure on any rank is the test's failure, and shows that rank's traceback. An expected
    failure on any rank is the expected failure. Ranks that skip while others run are a failure,
    because the others would wait for them.

    Args:
      reports: of each rank, by rank. One of them is changed and returned.
    """
    kinds = [_kind(report) for report in reports]
    kind = next(kind for kind in _KINDS if kind in kinds)
    rank = kinds.index(kind)
    report = reports[rank]
    if len(reports) == 1:
        return report
    lines = [f"rank {i} {k}{_message(reports[i])}" for i, k in enumerate(kinds)]
    if kind == "skipped" and set(kinds) != {"skipped"}:
        report.outcome = "failed"
        report.longrepr = (
            f"the ranks disagree: {'; '.join(lines)}. Expected all of them to skip, or none. Make "
            "the condition of the skip independent of the rank."
        )
    if kind == "failed" and (crash := getattr(report.longrepr, "reprcrash", None)):
        crash.message = f"rank {rank}: {crash.message}"  # what the short summary shows
    sections = [("multihost", "\n".join(lines))] if report.failed else []
    if kind == "failed":  # what became of ranks that waited for the failed one
        lost = dict.fromkeys(
            r.longreprtext for r, k in zip(reports, kinds, strict=True) if k in _LOST
        )
        sections += [("multihost", text) for text in lost]
    for i, other in enumerate(reports):
        most = _MAX_CHARACTERS if i == rank else _MAX_OTHERS
        sections += [(f"{name} [rank {i}]", text[-most:]) for name, text in other.sections]
    report.sections = sections
    report.duration = max(other.duration for other in reports)
    return report


def passed(item: pytest.Item, when: When) -> pytest.TestReport:
    """A phase without anything to tell."""
    return _make(item, when, lambda: None)


def failed(item: pytest.Item, when: When, text: str, kind: str = "failed") -> pytest.TestReport:
    """A phase that failed for a reason outside of the test, of a ``kind`` of its own."""

    def fail() -> None:
        raise pytest.fail.Exception(text, pytrace=False) from None  # not with what led here

    report = _make(item, when, fail)
    report.multihost_kind = kind  # type: ignore[attr-defined]
    return report


def skipped(item: pytest.Item, reason: str) -> pytest.TestReport:
    """A test that is skipped where it stands."""
    report = _make(item, "setup", lambda: pytest.skip(reason))
    path, line, _ = item.reportinfo()
    report.longrepr = (str(path), (line or 0) + 1, f"Skipped: {reason}")
    return report


def _make(item: pytest.Item, when: When, function: Callable[[], None]) -> pytest.TestReport:
    return pytest.TestReport.from_item_and_call(item, pytest.CallInfo.from_call(function, when))


def _to_json(config: pytest.Config, report: pytest.TestReport) -> str:
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    return json.dumps(data, default=repr)


def _kind(report: pytest.TestReport) -> str:
    if report.failed:
        if isinstance(report.longrepr, str) and report.longrepr.startswith("[XPASS(strict)]"):
            return "xpassed strict"
        kind: str = getattr(report, "multihost_kind", "failed")
        return kind
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    return report.outcome


def _message(report: pytest.TestReport) -> str:
    """The first line of what went wrong, to follow the rank's kind."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longrepr
    if not isinstance(text, str) or not text or _kind(report) in _LOST:
        return ""
    return f": {text.splitlines()[0]}"
