# SPDX-License-Identifier: Apache-2.0
"""How commands show things: tables on the terminal, JSON, and files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import click
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jax_smfree.cli.options import Refused

_LEAST_WRAPPED = 16  # characters of a column that wraps
_NO_END = 10_000

Row = Sequence[str | Text]


def table(
    title: str, head: Sequence[str], rows: Iterable[Row], *, text: int = 1, wrap: str = ""
) -> None:
    """Prints a table whose first ``text`` columns are text, and the others numbers.

    Only the column ``wrap`` gives way where the terminal is narrow: nothing is ever cut off.
    """
    rows = list(rows)
    console = _console()
    wide = console.options.update(width=_NO_END)
    narrow = [
        [_blank(c) if n == wrap else c for n, c in zip(head, row, strict=True)] for row in rows
    ]
    least = Measurement.get(console, wide, _built(head, narrow, text, wrap)).maximum
    console.width = max(console.width, least)
    if title:
        console.print(Text(title, style="bold"))
    console.print(_built(head, rows, text, wrap))


def _built(head: Sequence[str], rows: Iterable[Row], text: int, wrap: str) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column, name in enumerate(head):
        justify: Literal["left", "right"] = "left" if column < text else "right"
        shown.add_column(name, justify=justify, no_wrap=name != wrap, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def _blank(cell: str | Text) -> str:
    return " " * min(len(cell), _LEAST_WRAPPED)


def message(mark: Text, text: str) -> None:
    """Prints a line that begins with a coloured word."""
    _console().print(Text.assemble(mark, " ", text))


def _console() -> Console:
    """Brackets in what is shown are brackets, as in ``jax[cuda13]``, not colours.

    What goes to a file or another program is as wide as it wants, unless ``COLUMNS`` says
    otherwise.
    """
    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _NO_END
    return console


def as_json(value: Any) -> None:
    """Prints a JSON value, and nothing else."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def wrote(path: Path) -> None:
    """Says where a file went, beside what the command prints."""
    click.echo(f"wrote {path}", err=True)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      Refused: for a file that holds none.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"got {path}, expected a JSON file: {error}.") from error
