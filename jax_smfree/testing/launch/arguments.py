# SPDX-License-Identifier: Apache-2.0
"""The arguments of `launch`: how a program is named, and what is refused before anything starts."""

import ast
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_smfree._src.shown import shown

Program = str | os.PathLike[str] | Sequence[str] | Callable[..., object]
PLATFORMS = ("cpu", "cuda")
_MOST_SECONDS = 1_000_000  # as of every deadline of the library


def check_count(name: str, value: object) -> None:
    """``value`` is a number of processes or devices."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"launch: got {name}={shown(value)}, expected a whole number, at least 1.")


def check_platform(platform: object) -> None:
    """``platform`` is one that processes can be set up for."""
    if not isinstance(platform, str) or platform not in PLATFORMS:
        raise ValueError(f"launch: got platform={shown(platform)}, expected 'cpu' or 'cuda'.")


def check_seconds(name: str, value: object) -> None:
    """``value`` is a time to wait, which ends."""
    if not isinstance(value, int | float) or not 0 <= value <= _MOST_SECONDS:
        raise ValueError(
            f"launch: got {name}={shown(value)}, expected a number of seconds from 0 to "
            f"{_MOST_SECONDS:,}."
        )


def check_environment(env: Mapping[str, str] | None) -> None:
    """``env`` are variables that a process can have."""
    is_mapping = env is None or isinstance(env, Mapping)
    if not is_mapping or not all(isinstance(w, str) for pair in (env or {}).items() for w in pair):
        raise TypeError(f"launch: got env={shown(env)}, expected a mapping of strings to strings.")


def check_directory(name: str, value: object, *, exists: bool) -> None:
    """``value`` is a directory, or one that can be made."""
    if value is None:
        return
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"launch: got {name}={shown(value)}, expected a path.")
    path = Path(value)
    if (
        not os.fspath(value)
        or (exists and not path.is_dir())
        or (path.exists() and not path.is_dir())
    ):
        raise ValueError(f"launch: got {name}={str(path)!r}, expected a directory.")


def command_line(program: Program, args: Sequence[Any]) -> list[str]:
    """What follows ``python`` to run ``program`` with ``args``."""
    if isinstance(args, str | bytes) or not isinstance(args, Sequence):
        raise TypeError(f"launch: got args={shown(args)}, expected a list or tuple of arguments.")
    if callable(program):
        return ["-c", _call(program, tuple(args))]
    words = [program] if isinstance(program, str | os.PathLike) else program
    if not isinstance(words, Sequence) or not words or not all(map(_is_word, words)):
        raise TypeError(
            f"launch: got program={shown(program)}, expected a script's path, a list of what "
            "follows 'python' on a command line, or a function."
        )
    if wrong := [arg for arg in args if not _is_word(arg)]:
        raise TypeError(
            f"launch: got {shown(wrong[0])} among args, expected strings or paths: they are words "
            "of a command line. Write it as a string, or launch a function."
        )
    return [os.fspath(word) for word in (*words, *args)]


def _is_word(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)


def _call(function: Callable[..., object], args: tuple[Any, ...]) -> str:
    """Python source that imports ``function`` as this process did, and calls it."""
    name = getattr(function, "__qualname__", repr(function))
    if not inspect.isfunction(function) or "." in name or "<" in name:
        raise TypeError(
            f"launch: got {name}, expected a function of a module's top level, because a new "
            "process has to find it by its name. Move it there, and pass what it needs as args."
        )
    if not _is_literal(args):
        raise TypeError(
            f"launch: got args={shown(args)} for {name}, expected literals (numbers, strings, "
            "tuples, lists, dicts of them), because another process has to read them. Pass a path "
            "instead."
        )
    try:
        inspect.signature(function).bind(*args)
    except TypeError as error:
        raise TypeError(f"launch: got args={shown(args)} for {name}: {error}.") from None
    if function.__module__ == "__main__":
        lookup = f"import runpy; f = runpy.run_path({inspect.getfile(function)!r})[{name!r}]"
    else:
        lookup = f"from {function.__module__} import {name} as f"
    return f"import sys; sys.path[:] = {sys.path!r}; {lookup}; f(*{args!r})"


def _is_literal(value: object) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False
