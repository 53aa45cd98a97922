# SPDX-License-Identifier: Apache-2.0
"""The code in documents runs, in its order; and what they say of tests is so."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.cpu_only

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("document", "number"), [("moe_layer.md", 10), ("meshes.md", 3), ("rows.md", 6)]
)
def test_code_of_the_document_runs(document: str, number: int) -> None:
    text = (ROOT / "docs" / document).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == number
    exec(compile("\n".join(blocks), document, "exec"), {})


def test_code_about_memory_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/memory.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(code, "memory.md", "exec"), {})
    table = text[text.index("\n| model ") :]
    assert capsys.readouterr().out.strip() == table.strip()


def test_models_with_a_tick_have_a_test() -> None:
    clients = (ROOT / "tests/clients/test_transformers.py").read_text()
    (cases,) = re.findall(r"^CASES = \{\n(.*?)^\}", clients, flags=re.DOTALL | re.MULTILINE)
    tested = set(re.findall(r'^    "([^",]+)', cases, flags=re.MULTILINE))
    text = (ROOT / "docs/moe_layer.md").read_text()
    rows = re.findall(r"^\| (.*?) \|.*\| ✓ \|$", text, flags=re.MULTILINE)
    assert {model for row in rows for model in row.split(", ")} == tested
