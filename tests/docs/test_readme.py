# SPDX-License-Identifier: Apache-2.0
"""The first thing that a stranger copies runs as it stands."""

import pathlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_smfree import nn
from support import assert_trees_close

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    stand_in = nn.ReferenceGroup("ep", names["config"])

    def reference(layers, x):
        for params in layers:
            _, out, _ = nn.moe_layer(stand_in.token(), params, x, implementation="reference")
            x = x + out
        return x

    with names["group"]:
        expected = jax.jit(
            jax.shard_map(
                reference,
                mesh=names["mesh"],
                in_specs=(names["specs"], P("ep")),
                out_specs=P("ep"),
            )
        )(names["layers"], names["x"])
        assert_trees_close(names["y"].astype(jnp.float32), expected.astype(jnp.float32), 5e-2)
        names["group"].check()
