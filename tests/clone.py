# SPDX-License-Identifier: Apache-2.0
"""Importing this makes ``benchmarks`` importable, and nothing else of the clone.

Its ``jax_smfree`` is not the one that is installed, and would take its place.
"""

import importlib.util
import pathlib
import sys

_FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"

if "benchmarks" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "benchmarks", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules["benchmarks"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["benchmarks"])
