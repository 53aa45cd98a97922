# SPDX-License-Identifier: Apache-2.0
"""``jax-smfree doctor``."""

from __future__ import annotations

import os
import sys

import click
import jax
from rich.text import Text

from jax_smfree.cli import show
from jax_smfree.doctor import Diagnosis, Finding, examine, examine_links

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@click.command(short_help="Say what is missing here, and the cure.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--network",
    is_flag=True,
    help="Send rows between all pairs of nodes: run it in every process of a job, by its launcher.",
)
def doctor(as_json: bool, network: bool) -> None:
    """Say what is installed, built and connected here, what would break, and the cure.

    The exit code is 1 if something would make the library fail on this machine, or in this job.
    """
    environ = dict(os.environ)
    # A process that only looks must not take three quarters of each GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    diagnosis = examine_links(environ) if network else examine(environ)
    if not network or jax.process_index() == 0:  # all processes have found the same
        show.as_json(diagnosis.to_json()) if as_json else _print(diagnosis)
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
