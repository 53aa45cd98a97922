# SPDX-License-Identifier: Apache-2.0
"""``jax-smfree overlap``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.text import Text

from jax_smfree import inspect
from jax_smfree.cli import show
from jax_smfree.cli.options import EXISTING_FILE, FILE, PICTURE, refusing


@click.group()
def overlap() -> None:
    """Show what a program computes while rows move."""


@overlap.command()
@click.argument("program", type=EXISTING_FILE)
@click.option("--steps", is_flag=True, help="List the work of each window.")
@click.option(
    "--strict", is_flag=True, help="Exit with code 1 if there is a warning, or nothing to warn of."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def report(program: Path, steps: bool, strict: bool, as_json: bool) -> None:
    """Say what is scheduled between each send and its recv in PROGRAM.

    PROGRAM is a file with compiled.as_text() of compiled = jax.jit(f).lower(...).compile().
    """
    with refusing(OSError, ValueError, what=program):
        found = inspect.overlap_report(program.read_text())
    has_operations = bool(found.windows or found.orphans)
    if as_json:
        show.as_json(found.to_json())
    elif has_operations:
        _print(found, steps)
    else:
        click.echo(found)
    if strict and not has_operations:
        click.echo("Error: --strict: the program has no operation of jax_smfree.", err=True)
    sys.exit(1 if strict and (found.warnings or not has_operations) else 0)


def _print(found: inspect.OverlapReport, steps: bool) -> None:
    head = ("operation", "lane", "pass", "called at", "matmuls", "other", "GFLOP", "MB")
    show.table(
        "between send and recv",
        head,
        (
            (
                w.operation,
                str(w.lane),
                w.derived,
                w.call_site,
                str(len(w.matmuls)),
                str(len(w.between) - len(w.matmuls)),
                _giga(w.flops),
                f"{w.bytes / 1e6:.1f}",
            )
            for w in found.windows
        ),
        text=4,
        wrap="called at",
    )
    for window in (w for w in found.windows if steps and w.between):
        show.table(
            f"{window.send} … {window.recv}",
            ("instruction", "kind", "from", "GFLOP", "MB"),
            (
                (s.instruction, s.kind, s.op_name, _giga(s.flops), f"{s.bytes / 1e6:.1f}")
                for s in window.between
            ),
            text=3,
            wrap="from",
        )
    for warning in found.warnings:
        show.message(Text("warning", style="yellow"), warning)


def _giga(flops: int | None) -> str:
    return "unknown" if flops is None else f"{flops / 1e9:.1f}"


@overlap.command()
@click.argument("trace", type=EXISTING_FILE)
@click.option("--plot", type=PICTURE, help="Write a picture, e.g. timeline.png.")
@click.option("--perfetto", type=FILE, help="Write a JSON file for https://ui.perfetto.dev.")
def timeline(trace: Path, plot: Path | None, perfetto: Path | None) -> None:
    """Draw what ran when on GPUs, from what a group recorded.

    TRACE is a JSON file: {"phases": group.trace(), "wire": group.end_wire_trace()}.
    """
    if not (plot or perfetto):
        raise click.UsageError("got neither --plot nor --perfetto, expected at least one of them.")
    with refusing(ValueError, what=trace):
        found = inspect.Timeline.from_json(show.read_json(trace))
    if plot:
        from jax_smfree.inspect import timeline_plot

        timeline_plot.save(found, plot)
        show.wrote(plot)
    if perfetto:
        perfetto.write_text(json.dumps(found.trace_events()))
        show.wrote(perfetto)
