# SPDX-License-Identifier: Apache-2.0
"""What a caller passes, checked where it is passed: got, expected, where, cure.

``where`` names the function and ``name`` the argument. What is not of the right kind at all is a
``TypeError``, what is and lies outside of the range a ``ValueError``. The tokens and results of an
operation have checks of their own, `jax_smfree._src.checks`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_smfree import _native
from jax_smfree._src.shown import shown as shown

T = TypeVar("T")

# Experts, rows, lanes and ranks are numbered by int32 on the wire and in the kernels.
INT32_MAX = 2**31 - 1
# The most ranks of a group that is only planned.
MOST_RANKS = 2**20


def integer(where: str, name: str, value: Any, *, least: int = 1, most: int = INT32_MAX) -> int:
    """A number that is known while tracing, from ``least`` to ``most``."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        error = ValueError if isinstance(value, numbers.Real) else TypeError
        expected = "a positive integer" if least == 1 else "an integer"
        raise error(f"{where}: got {name}={shown(value)}, expected {expected}.{_static(value)}")
    if not least <= value <= most:
        expected = f"a positive integer of at most {most}" if least == 1 else f"{least} to {most}"
        raise ValueError(f"{where}: got {name}={shown(value)}, expected {expected}.")
    return int(value)


def number(where: str, name: str, value: Any, expected: str = "a finite number") -> float:
    """A finite number that is known while tracing; ``expected`` says which ones."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{where}: got {name}={shown(value)}, expected {expected}.{_static(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"{where}: got {name}={shown(value)}, expected {expected}.")
    return result


def flag(where: str, name: str, value: Any) -> bool:
    """True or False, and nothing that Python takes for one of them."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{where}: got {name}={shown(value)}, expected True or False.")
    return bool(value)


def choice(where: str, name: str, value: Any, options: Sequence[str | None]) -> Any:
    """One of a few words."""
    if not (value is None or isinstance(value, str)) or value not in options:
        words = [str(option) if option is None else repr(option) for option in options]
        listed = ", ".join(words[:-1]) + " or " + words[-1]
        raise ValueError(f"{where}: got {name}={shown(value)}, expected {listed}.")
    return value


def positive(where: str, name: str, value: Any, expected: str = "a positive number") -> float:
    """A finite number above zero."""
    if not number(where, name, value, expected) > 0:
        raise ValueError(f"{where}: got {name}={shown(value)}, expected {expected}.")
    return float(value)


def seconds(where: str, name: str, value: Any) -> float:
    """How long somebody waits at most, from 0 on."""
    most = _native.MAX_TIMEOUT_S
    expected = f"a number of seconds from 0 to {most:,.0f}"
    if not 0 <= number(where, name, value, expected) <= most:
        raise ValueError(f"{where}: got {name}={shown(value)}, expected {expected}.")
    return float(value)


def instance(where: str, name: str, value: Any, kind: type[T], cure: str = "") -> T:
    """An object of the class ``kind``."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        expected = f"{article} {kind.__name__}. {cure}".rstrip()
        raise TypeError(f"{where}: got {shown(value)} as {name}, expected {expected}")
    return value


def function(where: str, name: str, value: Any) -> Any:
    """What can be called."""
    if not callable(value):
        raise TypeError(f"{where}: got {shown(value)} as {name}, expected a function.")
    return value


def dtype(where: str, name: str, value: Any) -> np.dtype[Any]:
    """What names a type of array elements: ``jnp.bfloat16``, ``"float32"``, …"""
    cause = None
    if value is not None:  # which NumPy takes for float64
        try:
            found: np.dtype[Any] = np.dtype(value)
            return found
        except Exception as error:  # of several kinds
            cause = error
    raise TypeError(
        f"{where}: got {name}={shown(value)}, expected a dtype such as jnp.bfloat16."
    ) from cause


def as_array(where: str, name: str, value: Any, expected: str) -> jax.Array:
    """``value`` as an array, a tracer included; no lists, which may be anything."""
    if isinstance(value, (jax.Array, np.ndarray)) or hasattr(value, "__jax_array__"):
        try:
            result: jax.Array = jnp.asarray(value)
            return result
        except (TypeError, ValueError):  # an array of strings or of objects
            pass
    raise TypeError(f"{where}: got {shown(value)} as {name}, expected {expected}.")


def tree(where: str, name: str, value: Any) -> None:
    """A pytree whose leaves are arrays, or numbers."""
    for leaf in jax.tree.leaves(value):
        try:
            jax.typeof(leaf)
            jnp.asarray(leaf)
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(
                f"{where}: got {shown(leaf)} among {name}, expected arrays, or pytrees of them."
            ) from error


def array(
    where: str, name: str, value: Any, shape: Sequence[int | str], kind: Any = jnp.floating
) -> jax.Array:
    """``value`` as an array, a tracer included.

    ``shape`` has the sizes that are known, and a letter for those that are not; the same letter
    twice is the same size. ``kind`` is what the dtype must be, or must be a kind of.
    """
    result = as_array(where, name, value, f"an array {_sizes(shape)}")
    if not _is_kind(result.dtype, kind):
        raise TypeError(f"{where}: got {name} of {result.dtype}, expected {_kind_name(kind)}.")
    known: dict[str, int] = {}
    fits = len(result.shape) == len(shape) and all(
        size == (known.setdefault(want, size) if isinstance(want, str) else want)
        for size, want in zip(result.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{where}: got {name}{list(result.shape)}, expected {name}{_sizes(shape)}."
        )
    return result


def _is_kind(given: Any, kind: Any) -> bool:
    if isinstance(kind, type) and issubclass(kind, np.generic) and kind in _KINDS:
        return bool(jnp.issubdtype(given, kind) and not jnp.issubdtype(given, jnp.complexfloating))
    return bool(given == np.dtype(kind))


def _kind_name(kind: Any) -> str:
    return _KINDS[kind] if kind in _KINDS else np.dtype(kind).name


def _sizes(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _static(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return " It is static: pass a Python number, not a traced value."
    return ""


_KINDS: dict[Any, str] = {
    jnp.floating: "floating-point numbers",
    jnp.integer: "integers",
    jnp.number: "integers or floating-point numbers",
}
