# SPDX-License-Identifier: Apache-2.0
"""Writes what a run of these tests found, for `benchmarks/results/network-lab.md`."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jax_smfree._src import nvshmem
from jax_smfree.doctor.network import library_version

_PACKAGES = ("jax", "jaxlib", "libucx-cu13", "libucx-cu12")
_MOMENT = re.compile(r"moment\d+-")
_HEAD = """# The network lab

{when}, commit {commit}, {versions}; {machine}. `{command}`

Hosts are network namespaces of one machine, and GPUs of two hosts reach one another over TCP alone
(docs/multihost.md). This says nothing of speed over a network, of GPUDirect, of IBGDA, and of the
order in which a card writes to a GPU.

| test | passed | failed | skipped | seconds |
|---|---|---|---|---|
"""
_SECONDS = """
Seconds, the most of any process: of a fault, until the group was closed; of a cable, for all steps.
"""
_FAILED = """
## What failed

The end of what each said.

"""
_LONGEST = 3000  # characters of that
_WIRE = """
## Bytes on the wire

As the interfaces count them, beside what the rows have. The times are a check of the lab itself,
and no speed of the library: rows should not pass much faster than one plain TCP connection does.

"""


@dataclasses.dataclass
class _Row:
    """Of tests that differ by their moment only."""

    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0
    reasons: set[str] = dataclasses.field(default_factory=set)


class Report:
    """A plugin of pytest that writes ``path`` after each test: a time limit may end the run."""

    def __init__(self, path: str, arguments: tuple[str, ...]) -> None:
        self._path = Path(path)
        self._head = _HEAD.format(
            when=datetime.date.today().isoformat(),
            commit=_output_of("git", "rev-parse", "--short", "HEAD") or "unknown",
            versions=", ".join(_versions()),
            machine=_machine(),
            command=" ".join(("pytest", *arguments)),
        )
        self._rows: dict[str, _Row] = collections.defaultdict(_Row)
        self._wires: list[str] = []
        self._failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith("about the "):  # other backend
            return
        file, _, name = report.nodeid.partition("::")
        row = self._rows[f"{Path(file).name}::{_MOMENT.sub('', name)}"]
        row.outcomes[report.outcome] += 1
        row.reasons.add(reason)
        for name, value in report.user_properties:
            if name == "seconds":
                row.seconds = max(row.seconds, float(value))
            elif name == "wire":
                self._wires.append(str(value))
        if report.failed:
            self._failures[report.nodeid] = report.longreprtext[-_LONGEST:]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(self._text())

    def _text(self) -> str:
        text = self._head
        for name, row in sorted(self._rows.items()):
            of = row.outcomes
            skipped = f"{of['skipped']}: {'; '.join(sorted(row.reasons))}" if of["skipped"] else ""
            seconds = f"{row.seconds:.2f}" if row.seconds else ""
            failed = of["failed"] or ""
            text += f"| `{name}` | {of['passed'] or ''} | {failed} | {skipped} | {seconds} |\n"
        text += _SECONDS
        if self._wires:
            text += _WIRE + "".join(f"- {wire}\n" for wire in self._wires)
        if self._failures:
            text += _FAILED
        for name, failure in self._failures.items():
            text += f"`{Path(name).name}`:\n\n```\n{failure}\n```\n\n"
        return text


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if library := nvshmem.library():
        found.append(f"NVSHMEM {library_version(Path(library))}")
    return found


def _machine() -> str:
    gpus = _output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    kernel = f"Linux {platform.release()}"
    return f"{' and '.join(gpus.splitlines()) or 'no GPU'}, {kernel}"


def _output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
