# SPDX-License-Identifier: Apache-2.0
"""The first thing that a stranger copies runs as it stands."""

import pathlib
import re
import types
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_smfree._src import reference

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_example_runs() -> None:
    """And computes what the same functions compute by the reference's dispatch and combine."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    with names["group"] as group:
        group.check()
        stand_in = reference.Group("ep", names["config"])
        others = {**names, "smfree": reference, "group": stand_in}
        for function in ("moe", "model"):
            others[function] = types.FunctionType(names[function].__code__, others)
        sharding = {"in_specs": (names["specs"], P("ep")), "out_specs": P("ep")}
        step = jax.jit(jax.shard_map(others["model"], mesh=names["mesh"], **sharding))
        expected = step(names["layers"], names["x"])
        # bfloat16: where compilers round otherwise, a row of the second layer may go elsewhere.
        y, expected = (np.asarray(v, np.float32) for v in (names["y"], expected))
        assert np.isclose(y, expected, rtol=0.02, atol=0.05).mean() > 0.999
