# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown: what the reports of CPUs and GPUs have in common. What is missing is a dash.

A report is lines of text; a row of a comparison is ``(shape, what, value)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import Json

Row = tuple[str, str, float]


def find(place: Any, *keys: str) -> Any:
    """The value at a path of keys, or None."""
    for key in keys:
        place = place.get(key) if isinstance(place, dict) else None
    return place


def number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def ms(times: Json | None) -> str:
    """Median (10th to 90th percentile) in milliseconds."""
    if not times:
        return "–"
    p50, p10, p90 = (f"{times[p] / 1e3:.3f}" for p in ("p50", "p10", "p90"))
    return f"{p50} ({p10}–{p90})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    names = list(head)
    yield "| " + " | ".join(names) + " |"
    yield "|" + " --- |" * len(names)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def machine_line(machine: Json, devices: int = 1) -> str:
    gpu = ""
    if "device" in machine:
        driver = machine["gpu"].get("driver_version", "–")
        gpu = f"{devices} × {machine['device']}, driver {driver}, nvcc {machine['nvcc']}, "
    return (
        f"{machine['date']}, commit {machine['commit']}, {gpu}jax {machine['jax']}, Python "
        f"{machine['python']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, load {machine['load_average'][0]}"
    )


def errors(place: Any, path: str = "") -> Iterator[str]:
    """What went wrong, or was left out for want of time, and where."""
    if isinstance(place, dict):
        for key, value in place.items():
            if key in ("error", "skipped"):
                yield f"{path}: {key}: {str(value).splitlines()[0]}"
            else:
                yield from errors(value, f"{path} / {key}" if path else key)
    elif isinstance(place, list):
        for at, value in enumerate(place):
            yield from errors(value, f"{path} {at}")


def not_measured(places: Iterable[str]) -> Iterator[str]:
    """A section of what `errors` and others have found, if anything."""
    found = list(places)
    if found:
        yield from ("## Not measured", "", *(f"- {line}" for line in found), "")


def best(runs: list[Json], rows: Callable[[Json], Iterator[Row]]) -> dict[tuple[str, str], float]:
    """The shortest time, or the largest share hidden, of several runs."""
    found: dict[tuple[str, str], float] = {}
    for run in runs:
        for shape, what, value in rows(run):
            choose = max if what.startswith("hidden") else min
            found[shape, what] = choose(value, found.get((shape, what), value))
    return found


def comparison(
    result: Json,
    names: tuple[str, str],
    rows: Callable[[Json], Iterator[Row]],
    shown: Callable[[str], bool] = lambda what: True,
) -> Iterator[str]:
    """Two variants that ran by turns (`benchmarks.apart`), the best of each; second over first."""
    first, second = (best(result[name], rows) for name in names)

    def texts() -> Iterator[list[str]]:
        for shape, what in first | second:
            if shown(what):
                one, other = (found.get((shape, what)) for found in (first, second))
                both = one and other and not what.startswith("hidden")
                ratio = f"{other / one:.3f}" if both else ""  # type: ignore[operator]
                values = ("–" if v is None else f"{v:.5g}" for v in (one, other))
                yield [shape, what, *values, ratio]

    yield from table(["shape", "what", *names, "ratio"], texts())
    runs = {name: result[name] for name in names}
    yield from not_measured([*errors(runs), *result.get("failed", [])])


def show(path: Path, lines: Iterable[str]) -> None:
    """On the terminal, and as Markdown beside the JSON at ``path``."""
    text = "\n".join(lines).rstrip("\n") + "\n"
    path.with_suffix(".md").write_text(text)
    print(text)
    print(f"wrote {path} and {path.with_suffix('.md').name}")
