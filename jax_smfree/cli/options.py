# SPDX-License-Identifier: Apache-2.0
"""Kinds of options that several commands take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import click

FILE = click.Path(path_type=Path, dir_okay=False)
EXISTING_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
SIZES = "ROWSxHIDDEN:KofEXPERTS"
DTYPES = click.Choice(["float32", "bfloat16", "float16"])


class Sizes(NamedTuple):
    """``ROWSxHIDDEN:KofEXPERTS``."""

    rows: int
    hidden: int
    top_k: int
    experts: int

    def __str__(self) -> str:
        return "{}x{}:{}of{}".format(*self)


def sizes(value: str) -> Sizes:
    """Reads the text of `Sizes`, as the ``type`` of an option."""
    found = re.fullmatch(r"(\d+)x(\d+):(\d+)of(\d+)", value)
    if not found:
        raise click.BadParameter(f"got {value!r}, expected {SIZES}, as 8192x7168:8of256.")
    return Sizes(*map(int, found.groups()))


def numbers(value: str) -> tuple[int, ...]:
    """Reads positive numbers, as the ``type`` of an option."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value):
        raise click.BadParameter(f"got {value!r}, expected numbers, as 2,4,8.")
    return tuple(int(number) for number in value.split(","))
