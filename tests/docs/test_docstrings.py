# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of public functions run, after the lines in docs/api/core.md."""

import doctest
import importlib
import inspect
import pathlib
import re
from typing import Any

import pytest

pytestmark = pytest.mark.cpu_only

CORE = pathlib.Path(__file__).parents[2] / "docs" / "api" / "core.md"
PACKAGES = ("", ".doctor", ".inspect", ".nn", ".plan")


def public() -> dict[str, Any]:
    """The functions and classes that the packages name."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(f"jax_smfree{package}")
        values = {f"jax_smfree{package}.{n}": getattr(module, n) for n in module.__all__}
        found |= {n: v for n, v in values.items() if inspect.isfunction(v) or inspect.isclass(v)}
    return found


OBJECTS = public()


@pytest.fixture(scope="module")
def names():
    """What an example may use; the group is closed after all of them."""
    (code,) = re.findall(r"```python\n(.*?)```", CORE.read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, str(CORE), "exec"), found)
    yield found
    with found["group"] as group:
        group.check()


def run(value: Any, names: dict[str, Any]) -> int:
    """Runs the examples of one docstring; how many there were."""
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    finder = doctest.DocTestFinder(recurse=inspect.isclass(value))  # methods too
    tests = finder.find(value, value.__qualname__, globs=names)
    for test in tests:
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)
    return sum(len(test.examples) for test in tests)


@pytest.mark.parametrize("name", OBJECTS)
def test_examples_run(name, names):
    """Every function has one."""
    value = OBJECTS[name]
    assert "+SKIP" not in (value.__doc__ or "") or inspect.isclass(value)
    assert run(value, names) or inspect.isclass(value)


@pytest.mark.parametrize("library", ["equinox", "nnx"])
def test_examples_of_modules_run(library, names):
    framework = importlib.import_module("equinox" if library == "equinox" else "flax.nnx")
    module = importlib.import_module(f"jax_smfree.nn.{library}")
    more = {library: framework, "MoeLayer": module.MoeLayer}
    assert run(module.MoeLayer, names | more)
