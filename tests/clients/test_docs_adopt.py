# SPDX-License-Identifier: Apache-2.0
"""The code in docs/adopt.md: the program runs, the functions are those of examples/."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.cpu_only

ROOT = pathlib.Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adopt.md").read_text(), flags=re.DOTALL)


def test_the_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason="needs pip install '.[clients]'")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    exec(compile(BLOCKS[0], "docs/adopt.md", "exec"), {})


def test_the_functions_are_those_of_the_examples() -> None:
    files = ("hf_moe", "maxtext_moe", "levanter_moe")
    source = "".join((ROOT / f"examples/{name}.py").read_text() for name in files)
    assert len(BLOCKS) == 10
    for block in BLOCKS[1:]:
        assert block.startswith("def ") and block in source
