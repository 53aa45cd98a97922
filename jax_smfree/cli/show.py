# SPDX-License-Identifier: Apache-2.0
"""How commands show things: tables on the terminal, JSON, and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def table(
    title: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    text: int = 1,
    wrap: str = "",
) -> None:
    """Prints a table whose first ``text`` columns are text, and the others numbers.

    Heads wrap, and of the text the column ``wrap``.
    """
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column, name in enumerate(head):
        is_text = column < text
        justify: Literal["left", "right"] = "left" if is_text else "right"
        shown.add_column(name, justify=justify, no_wrap=is_text and name != wrap)
    for row in rows:
        shown.add_row(*row)
    _console().print(shown)


def message(mark: Text, text: str) -> None:
    """Prints a line that begins with a coloured word."""
    _console().print(Text.assemble(mark, " ", text))


def _console() -> Console:
    """Brackets in what is shown are brackets, as in ``jax[cuda13]``, not colours."""
    return Console(markup=False, highlight=False)


def as_json(value: Any) -> None:
    """Prints a JSON value, and nothing else."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def wrote(path: Path) -> None:
    """Says where a file went, beside what the command prints."""
    click.echo(f"wrote {path}", err=True)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      click.ClickException: for a file that holds none.
    """
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise click.ClickException(f"got {path}, expected a JSON file: {error}.") from error
