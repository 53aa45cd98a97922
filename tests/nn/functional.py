# SPDX-License-Identifier: Apache-2.0
"""What the modules are compared with: the functional layer, in plain jax.numpy."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_smfree import nn

ROWS, HIDDEN, EXPERTS = 16, 32, 8


def config(**options):
    sizes = {"num_experts": EXPERTS, "top_k": 2, "hidden": HIDDEN, "max_tokens": ROWS}
    return sizes | {"dtype": jnp.float32} | options


def rows_on(group):
    count = ROWS * group.mesh.size
    x = np.random.default_rng(0).standard_normal((count, HIDDEN)).astype(np.float32)
    return jax.device_put(x, NamedSharding(group.mesh, P(group.mesh_axes)))


def functional(group, params, x):
    """The layer without a module, and with plain jax.numpy in place of dispatch and combine."""

    def on_each_rank(params, x):
        return nn.moe_layer(group.token(), params, x, implementation="reference")[1]

    specs = nn.moe_specs(params, group.axis), P(group.mesh_axes)
    sharded = jax.shard_map(
        on_each_rank, mesh=group.mesh, in_specs=specs, out_specs=specs[1], check_vma=False
    )
    return jax.jit(sharded)(params, x)


def loss(layer, x):
    """Of which every parameter of a module has a gradient."""
    out, aux = layer(x)
    return jnp.mean((out - x) ** 2) + 0.01 * aux.load_balancing_loss
