# SPDX-License-Identifier: Apache-2.0
"""Tables on terminals of any width, in pipes and in files: no number is cut off."""

import re

import pytest

pytestmark = pytest.mark.cpu_only

PLAN = ("plan", "--shape", "1048576x131072:1024of1024", "--ranks", "2,4,1024")
REPORT = ("overlap", "report", "docs/examples/forward.hlo", "--steps")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def numbers(text: str) -> list[str]:
    return NUMBER.findall(text)


@pytest.mark.parametrize("columns", [1, 40, 80, 100, None], ids=str)
def test_all_numbers_are_shown(run, monkeypatch, pytestconfig, columns):
    monkeypatch.chdir(pytestconfig.rootpath)
    for command in (PLAN, REPORT):
        monkeypatch.setenv("COLUMNS", "500")
        whole = run(*command).output
        if columns is None:
            monkeypatch.delenv("COLUMNS")
        else:
            monkeypatch.setenv("COLUMNS", str(columns))
        shown = run(*command).output
        if command is PLAN:
            assert numbers(shown) == numbers(whole)
            assert "…" not in shown
        else:
            ends = [line.split()[-2:] for line in whole.splitlines() if "fusion" in line]
            assert ends == [line.split()[-2:] for line in shown.splitlines() if "fusion" in line]


def test_what_goes_into_a_pipe_is_whole(run, monkeypatch, pytestconfig):
    """Lines of text are not broken there, nor names shortened."""
    monkeypatch.chdir(pytestconfig.rootpath)
    monkeypatch.delenv("COLUMNS")
    text = run(*REPORT).output
    assert "…" not in text.replace(" … ", "")
    assert "jit(one_layer)/shard_map/under_dispatch/dot_general" in text
    warnings = run("overlap", "report", "docs/examples/untied.hlo").output
    assert sum(line.startswith("warning") for line in warnings.splitlines()) == 2
    assert warnings.count("Run work there with smfree.overlap(token, fn, *args).") == 2


@pytest.mark.parametrize(
    "command",
    [
        "doctor",
        "plan",
        "overlap report docs/examples/untied.hlo",
        "overlap report docs/examples/forward.hlo --steps",
        "--help",
    ],
)
def test_a_terminal_of_80_columns_is_wide_enough(run, monkeypatch, pytestconfig, command):
    """No line is broken by the terminal, and nothing is cut off."""
    monkeypatch.chdir(pytestconfig.rootpath)
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(*command.split()).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and "[ARGS]..." not in line]
    assert not [line for line in lines if "…" in line.replace(" … ", "")]
