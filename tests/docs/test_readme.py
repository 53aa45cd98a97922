# SPDX-License-Identifier: Apache-2.0
"""The first thing that a stranger copies runs as it stands, and prints what is shown."""

import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_smfree._src import reference

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
CODE, OUTPUT = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", README, flags=re.DOTALL)[0]


@pytest.mark.cpu_only
def test_the_program_prints_what_is_shown(tmp_path: pathlib.Path) -> None:
    """In a process of its own, without what pytest has set."""
    program = tmp_path / "layer.py"
    program.write_text(CODE)
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == OUTPUT


def test_it_computes_what_the_reference_does() -> None:
    """The same functions by the reference's dispatch and combine."""
    # The devices of this process are there already.
    code = re.sub(r"^jax\.config\.update.*$", "", CODE, flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    with names["group"] as group:
        group.check()
        stand_in = reference.Group("ep", names["config"])
        others = {**names, "smfree": reference, "group": stand_in}
        for function in ("moe", "layer"):
            others[function] = types.FunctionType(names[function].__code__, others)
        sharding = {"in_specs": (names["specs"], P("ep")), "out_specs": P("ep")}
        step = jax.jit(jax.shard_map(others["layer"], mesh=names["mesh"], **sharding))
        expected = step(names["params"], names["x"])
        # bfloat16: compilers may round otherwise.
        y, expected = (np.asarray(v, np.float32) for v in (names["y"], expected))
        assert np.isclose(y, expected, rtol=0.02, atol=0.05).mean() > 0.999
