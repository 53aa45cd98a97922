# SPDX-License-Identifier: Apache-2.0
"""An MoE layer with the kernels for Hopper, which are loaded at their first launch.

While one is loaded, the driver holds up what other threads launch in XLA's context. Neither copies
to near peers nor puts to far ones may wait for that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_smfree import nn
from support import ep_mesh

ROWS, HIDDEN, EXPERTS, TOP_K, LAYERS = 512, 256, 8, 2, 2


def gradients(group, params, x):
    """Of some layers, by expert parameters and rows: the shards of this process."""

    def local(params, x):
        token = group.token()
        for _ in range(LAYERS):
            token, x, _ = nn.moe_layer(token, params, x)
        return x

    specs = nn.moe_specs(params, "ep")
    layers = jax.shard_map(local, mesh=group.mesh, in_specs=(specs, P("ep")), out_specs=P("ep"))

    def loss(experts, x):
        out = layers(nn.MoeParams(params.router, experts, None), x)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    found = jax.jit(jax.grad(loss, (0, 1)))(params.experts, x)
    return jax.tree.map(
        lambda a: [np.asarray(s.data, np.float32) for s in a.addressable_shards], found
    )


def gpus(processes):
    return pytest.mark.multihost(processes=processes, devices_per_process=1, platform="cuda")


@pytest.mark.parametrize(
    "ranks, ranks_per_node",
    [pytest.param(2, 1, marks=gpus(2)), pytest.param(4, 2, marks=gpus(4))],
)
@pytest.mark.cuda_only
def test_gradients_of_near_and_far_peers(groups, world, ranks, ranks_per_node):
    """To the bit, and in hierarchical mode within what bfloat16 rounds sums of sums."""
    mesh = ep_mesh(ranks)
    init = functools.partial(
        nn.init_moe, hidden=HIDDEN, num_experts=EXPERTS, expert_width=HIDDEN, dtype=jnp.bfloat16
    )
    specs = nn.moe_specs(jax.eval_shape(init, jax.random.key(0)), "ep")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    rows = functools.partial(jax.random.normal, shape=(ranks * ROWS, HIDDEN), dtype=jnp.bfloat16)
    x = jax.jit(rows, out_shardings=NamedSharding(mesh, P("ep")))(jax.random.key(1))
    config = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": ROWS}
    nodes = groups(mesh, **config, ranks_per_node=ranks_per_node, timeout_s=20)
    far = gradients(nodes, params, x)
    near = gradients(groups(mesh, **config, timeout_s=20), params, x)
    for a, e in zip(jax.tree.leaves(far), jax.tree.leaves(near), strict=True):
        tolerance = 0.05 * np.abs(e).max() if nodes.config.mode == "hierarchical" else 0
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(near))
    world.barrier()
