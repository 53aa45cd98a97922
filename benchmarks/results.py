# SPDX-License-Identifier: Apache-2.0
"""Result files, JSON with one line per case, and `Session`, a run that writes one as it goes."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]

FOLDER = Path(__file__).parent / "results"
# Percentiles by program, programs by case: what nests deeper is cases by name.
_CASE_HEIGHT = 3


def dumps(value: Any, indent: int = 0) -> str:
    """``value`` as JSON, with each case on a line of its own."""
    if _height(value) <= _CASE_HEIGHT:
        return json.dumps(value)
    members = isinstance(value, dict)
    pad = " " * (indent + 1)
    lines = (
        f"{pad}{json.dumps(key)}: {dumps(member, indent + 1)}"
        if members
        else pad + dumps(member, indent + 1)
        for key, member in (value.items() if members else enumerate(value))
    )
    begin, end = "{}" if members else "[]"
    return "\n".join([begin, ",\n".join(lines), " " * indent + end])


def _height(value: Any) -> int:
    members = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_height, members), default=0) if isinstance(value, dict | list) else 0


def load(path: Path) -> Json:
    value: Json = json.loads(path.read_text())
    return value


def write(path: Path, value: Json) -> None:
    path.write_text(dumps(value) + "\n")


def slug(name: str) -> str:
    """``name`` of a device as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_of_gpus(command: str, described: Json) -> str:
    """The name of what a command has measured on GPUs, which `machine.describe_gpus` describes."""
    return f"gpu-{command}-{slug(described['device'])}-x{described['devices']}.json"


class Session:
    """The results of a run, on disk after every part, and the time that is left for more."""

    def __init__(self, path: Path, machine: Json, budget_s: float) -> None:
        self.path = path
        self.result: Json = {"machine": machine, "shapes": {}}
        self._start, self._budget_s = time.perf_counter(), budget_s

    @property
    def spent(self) -> bool:
        return time.perf_counter() - self._start > self._budget_s

    def part(self, place: Json, name: str, measure: Callable[..., None], *args: Any) -> None:
        """``place[name]`` is what ``measure`` puts into it, and its error if it fails."""
        into = place[name] = {}
        start = time.perf_counter()
        if self.spent:
            into["skipped"] = f"the budget of {self._budget_s:.0f} s was spent"
            return
        try:
            measure(into, *args)
        except Exception as error:
            into["error"] = f"{type(error).__name__}: {error}"
            print(f"  {name}: {into['error'].splitlines()[0]}")
        into["took_s"] = round(time.perf_counter() - start, 1)
        print(f"  {name}: {into['took_s']} s", flush=True)
        self.save()

    def save(self) -> None:
        self.result["took_s"] = round(time.perf_counter() - self._start, 1)
        write(self.path, self.result)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every command has."""
    parser.add_argument("--out", type=Path, help="the folder for files")
    parser.add_argument("--commit", help="of the sources, where they are not in a git checkout")
    parser.add_argument("--smoke", action="store_true", help="tiny; nothing is kept without --out")
    parser.add_argument("--load", type=Path, help="shows an earlier JSON instead of measuring")


@contextlib.contextmanager
def folder(options: argparse.Namespace, default: Path | None = FOLDER) -> Iterator[Path]:
    """Where the results go; without a default, and in a smoke test, nowhere that stays."""
    with tempfile.TemporaryDirectory() as scratch:
        chosen = options.out or (None if options.smoke else default) or Path(scratch)
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
