# SPDX-License-Identifier: Apache-2.0
"""Runs the commands that the documentation shows, and puts their output where it stands.

    python docs/make_examples.py             all pages
    python docs/make_examples.py plan        only commands that begin with "jax-smfree plan"

A command is a ``console`` block that begins with ``$ jax-smfree``; what follows in the block is its
output. Commands run in docs/examples, and leave their pictures there. The programs there are
``python tests/schedule/programs.py DIRECTORY forward untied``, with the scheduler on.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).resolve().parent
EXAMPLES = DOCS / "examples"
RESULTS = DOCS.parent / "benchmarks/results/gpu-nvidia-h200-x2.json"
BLOCK = re.compile(r"^```console\n\$ jax-smfree (.*)\n([^`]*)```$", re.MULTILINE)
COLUMNS = "102"


def write_trace() -> None:
    """The timeline of the committed run, as a file of its own."""
    shape = json.loads(RESULTS.read_text())["shapes"]["8192x7168:8of256"]
    trace = shape["movers"]["copy engine"]["native"]["timeline"]
    (EXAMPLES / "trace.json").write_text(json.dumps(trace, indent=1) + "\n")


def draw_life_of_a_token() -> None:
    script = DOCS.parent / "examples/life_of_a_token.py"
    output = EXAMPLES / "life_of_a_token.png"
    subprocess.run([sys.executable, script, "--output", output], check=True)


def output_of(arguments: str) -> str:
    """What ``jax-smfree`` prints, without trailing spaces and empty lines around it."""
    command = [sys.executable, "-m", "jax_smfree", *shlex.split(arguments)]
    environment = {**os.environ, "COLUMNS": COLUMNS, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=EXAMPLES, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n")


def updated(page: str, output: Callable[[str], str]) -> str:
    """``page`` with the output of each of its commands."""

    def block(found: re.Match[str]) -> str:
        text = output(found[1])
        return f"```console\n$ jax-smfree {found[1]}\n{text}\n```" if text else found[0]

    return BLOCK.sub(block, page)


def main(only: str) -> None:
    write_trace()
    draw_life_of_a_token()
    for path in sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]):
        page = path.read_text()
        new = updated(page, lambda c: output_of(c) if c.startswith(only) else "")
        if new != page:
            path.write_text(new)
            print(f"updated {path}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
