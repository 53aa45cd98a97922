# SPDX-License-Identifier: Apache-2.0
"""Kinds of options that several commands take, and what a command refuses.

Whatever is wrong with an invocation ends in one line and exit code 2, before any work is done.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

EXISTING_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
SIZES = "ROWSxHIDDEN:KofEXPERTS"
DTYPES = click.Choice(["float32", "bfloat16", "float16"])
MAX_RANKS = 2048


class Refused(click.ClickException):
    """What was asked for cannot be done; shown as one line."""

    exit_code = 2

    def __init__(self, error: object) -> None:
        super().__init__(" ".join(str(error).split()))


@contextlib.contextmanager
def refusing(*kinds: type[Exception], what: object = "") -> Iterator[None]:
    """Turns errors of these ``kinds`` into one line, which begins with ``what``."""
    try:
        yield
    except kinds as error:
        raise Refused(f"{what}: {error}" if what else error) from error


class _OutputFile(click.Path):
    """A file that can be written: its folder is there now, and not only when the work is done."""

    def __init__(self, *endings: str) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)
        self._endings = endings

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        try:
            path = Path(os.fspath(value))
            super().convert(value, param, ctx)
            there = path.parent.is_dir()
            # The name as such: too long, for example.
            path.exists()
        except (OSError, ValueError) as error:
            self.fail(f"got {value!r}: {error}.", param, ctx)
        if not path.name or not there or not os.access(path.parent, os.W_OK):
            self.fail(f"got {value!r}, expected a file in a folder that can be written.")
        if self._endings and path.suffix.lower() not in self._endings:
            expected = ", ".join(self._endings)
            self.fail(f"got {value!r}, expected a name that ends in one of {expected}.")
        return path


FILE = _OutputFile()
PICTURE = _OutputFile(".png", ".pdf", ".svg")


class Sizes(NamedTuple):
    """``ROWSxHIDDEN:KofEXPERTS``."""

    rows: int
    hidden: int
    top_k: int
    experts: int

    def __str__(self) -> str:
        return "{}x{}:{}of{}".format(*self)


# With these no product of sizes, lanes and ranks exceeds an int64.
_MOST = Sizes(rows=2**20, hidden=2**17, top_k=2**10, experts=2**20)
MAX_LANES = 16


def sizes(value: str) -> Sizes:
    """Reads the text of `Sizes`, as the ``type`` of an option."""
    found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9}):([0-9]{1,9})of([0-9]{1,9})", value)
    if not found:
        raise click.BadParameter(f"got {value!r}, expected {SIZES}, as 8192x7168:8of256.")
    result = Sizes(*map(int, found.groups()))
    for name, size, most in zip(Sizes._fields, result, _MOST, strict=True):
        if not 1 <= size <= most:
            raise click.BadParameter(f"got {size} {name} in {value!r}, expected 1 to {most}.")
    return result


def numbers(value: str) -> tuple[int, ...]:
    """Reads numbers of ranks, as the ``type`` of an option."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", value):
        raise click.BadParameter(f"got {value!r}, expected numbers, as 2,4,8.")
    result = tuple(int(number) for number in value.split(","))
    if max(result) > MAX_RANKS:
        raise click.BadParameter(f"got {max(result)} ranks, expected at most {MAX_RANKS}.")
    return result


def positive(value: str) -> float:
    """Reads a positive, finite number, as the ``type`` of an option."""
    try:
        result = float(value)
    except ValueError:
        result = math.nan
    if not 1e-9 <= result <= 1e9:
        raise click.BadParameter(f"got {value!r}, expected a positive number.")
    return result
