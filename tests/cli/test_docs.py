# SPDX-License-Identifier: Apache-2.0
"""The commands in docs/ print what the pages say, where that is the same on every machine."""

import importlib
import pathlib
import re
import runpy

import pytest

pytestmark = pytest.mark.cpu_only

DOCS = pathlib.Path(__file__).parents[2] / "docs"
EXAMPLES = runpy.run_path(str(DOCS / "make_examples.py"))
SHOWN = [
    (command, output)
    for page in sorted(DOCS.glob("*.md"))
    for command, output in EXAMPLES["BLOCK"].findall(page.read_text())
]


@pytest.mark.parametrize(
    ("command", "output"),
    [(c, o) for c, o in SHOWN if c.startswith(("plan", "overlap report"))],
)
def test_output(run, command, output, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", EXAMPLES["COLUMNS"])
    for example in (DOCS / "examples").glob("*.hlo"):
        (tmp_path / example.name).write_bytes(example.read_bytes())
    monkeypatch.chdir(tmp_path)
    lines = [line.rstrip() for line in run(*command.split()).stdout.splitlines()]
    assert "\n".join(lines).strip("\n") == output.rstrip("\n")


def test_every_command_is_shown():
    assert {command.split()[0] for command, _ in SHOWN} == {"doctor", "overlap", "plan", "bench"}


@pytest.mark.parametrize("module", ["bench", "doctor", "inspect", "nn", "plan", "testing"])
def test_the_reference_has_every_public_name(module):
    reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^\.\. auto\w+:: (\w+)$", reference, re.MULTILINE))
    assert set(importlib.import_module(f"jax_smfree.{module}").__all__) <= shown


def test_architecture_names_files():
    """The walk of a row leads through files that are there."""
    page = (DOCS / "architecture.md").read_text()
    named = re.findall(r"`((?:jax_smfree|ffi|csrc)/[\w/.]+\.\w+)`", page)
    assert len(named) > 30
    assert [path for path in named if not (DOCS.parent / path).is_file()] == []
