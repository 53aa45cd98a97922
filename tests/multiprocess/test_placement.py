# SPDX-License-Identifier: Apache-2.0
"""Parameters over several processes: each makes what its devices hold, and nobody the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_smfree import nn
from support import ep_mesh, make_problem

ROWS, HIDDEN, EXPERTS, LAYERS = 6, 16, 8, 2
CONFIG = {"num_experts": EXPERTS, "top_k": 2, "hidden": HIDDEN, "max_tokens": ROWS}


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(
            ranks,
            marks=[
                mark,
                pytest.mark.multihost(
                    processes=2, devices_per_process=ranks // 2, platform=platform
                ),
            ],
        )
        for ranks, mark, platform in (
            (4, pytest.mark.cpu_only, "cpu"),
            (2, pytest.mark.cuda_only, "cuda"),
        )
    ],
)
def test_layers_are_made_over_processes(groups, world, ranks):
    mesh = ep_mesh(ranks)
    group, x = groups(mesh, **CONFIG, dtype=jnp.float32), make_problem(mesh, tokens=ROWS).x
    make = functools.partial(nn.init_moe_on_mesh, group=group, expert_width=HIDDEN)
    keys = jax.random.split(jax.random.key(0), LAYERS)
    stack = jax.vmap(lambda key: make(key))(keys)
    step = jax.jit(lambda params, x: nn.moe_layer_on_mesh(group, params, x)[0])
    for layer, key in enumerate(keys):
        params = make(key)
        for shard, of_stack in zip(
            params.experts.gate.addressable_shards,
            stack.experts.gate.addressable_shards,
            strict=True,
        ):
            assert shard.data.shape == (EXPERTS // ranks, HIDDEN, HIDDEN)
            np.testing.assert_allclose(shard.data, of_stack.data[layer], rtol=1e-6)
        out = step(params, x)
        assert all(np.isfinite(np.asarray(s.data)).all() for s in out.addressable_shards)
    world.barrier()
