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
