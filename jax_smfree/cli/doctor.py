# SPDX-License-Identifier: Apache-2.0
"""``jax-smfree doctor``."""

from __future__ import annotations

import os
import sys

import click
from rich.text import Text

from jax_smfree.cli import show
from jax_smfree.doctor import Diagnosis, Finding, examine

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def doctor(as_json: bool) -> None:
    """Say what is installed, built and connected here, what would break, and the cure.

    The exit code is 1 if something would make the library fail on this machine.
    """
    environ = dict(os.environ)
    # A process that only looks must not take three quarters of each GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    diagnosis = examine(environ)
    if as_json:
        show.as_json(diagnosis.to_json())
    else:
        _print(diagnosis)
    sys.exit(1 if diagnosis.problems else 0)


def _print(diagnosis: Diagnosis) -> None:
    rows = [(f.topic, f.name, f.value, _mark(f)) for f in diagnosis.findings]
    show.table("", ("of", "what", "found", ""), rows, text=4, wrap="found")
    gpus = [str(i) for i in range(len(diagnosis.peer_access))]
    if len(gpus) > 1:
        marks = (["✓" if ok else "✗" for ok in row] for row in diagnosis.peer_access)
        matrix = [[gpu, *row] for gpu, row in zip(gpus, marks, strict=True)]
        show.table("GPU reads the memory of GPU", ["", *gpus], matrix)
    for finding in diagnosis.findings:
        if finding.cure:
            show.message(_mark(finding), f"{finding.name}: {finding.value}\n  {finding.cure}")


def _mark(finding: Finding) -> Text:
    return Text(finding.status, style=_STYLES[finding.status])
