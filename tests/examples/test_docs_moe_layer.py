# SPDX-License-Identifier: Apache-2.0
"""The code in docs/moe_layer.md runs, in its order."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.cpu_only

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "moe_layer.md"


def test_code_of_the_document_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(blocks) == 8
    exec(compile("\n".join(blocks), str(DOCUMENT), "exec"), {})


def test_models_with_a_tick_have_a_test() -> None:
    clients = (DOCUMENT.parents[1] / "tests/clients/test_transformers.py").read_text()
    (cases,) = re.findall(r"^CASES = \{\n(.*?)^\}", clients, flags=re.DOTALL | re.MULTILINE)
    tested = set(re.findall(r'^    "([^",]+)', cases, flags=re.MULTILINE))
    rows = re.findall(r"^\| (.*?) \|.*\| ✓ \|$", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert {model for row in rows for model in row.split(", ")} == tested
