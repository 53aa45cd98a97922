# SPDX-License-Identifier: Apache-2.0
"""What dispatch and combine do: two ranks, three rows each, and numbers that you can follow."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from support import ep_mesh

# Rank 0 owns experts 0 and 1, rank 1 owns 2 and 3. The first three rows are rank 0's.
X = [[1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [4.0, 4.5], [5.0, 5.5], [6.0, 6.5]]
TOPK_IDX = [[0, 3], [2, 3], [-1, 0], [1, -1], [0, 2], [-1, -1]]  # -1: no expert
WEIGHTS = [[0.5, 0.5], [0.25, 0.75], [9.0, 1.0], [2.0, 9.0], [0.5, 1.0], [9.0, 9.0]]

# Rows come grouped by expert; in a group by source rank, then in their order there.
RECEIVED = [
    [[1.0, 1.5], [3.0, 3.5], [5.0, 5.5], [4.0, 4.5]],  # on rank 0: three for expert 0, one for 1
    [[2.0, 2.5], [5.0, 5.5], [1.0, 1.5], [2.0, 2.5]],  # on rank 1: two for each of its experts
]
GROUP_SIZES = [[3, 1], [2, 2]]
# The experts return what they get, so a row comes back times the sum of its weights.
OUT = [[1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [8.0, 9.0], [7.5, 8.25], [0.0, 0.0]]


def test_dispatch_and_combine(groups):
    mesh = ep_mesh(2)
    group = groups(mesh, num_experts=4, top_k=2, hidden=2, max_tokens=3, dtype=jnp.float32)

    def on_each_rank(x, topk_idx, weights):
        d, token = smfree.dispatch(group.token(), x, topk_idx, weights)
        out, token = smfree.combine(token, d, d.x)
        return d.x, d.group_sizes, out

    step = jax.shard_map(on_each_rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    rows, group_sizes, out = jax.jit(step)(jnp.array(X), jnp.array(TOPK_IDX), jnp.array(WEIGHTS))
    np.testing.assert_array_equal(np.split(rows, 2)[0][:4], RECEIVED[0])
    np.testing.assert_array_equal(np.split(rows, 2)[1][:4], RECEIVED[1])
    np.testing.assert_array_equal(np.split(group_sizes, 2), GROUP_SIZES)
    np.testing.assert_array_equal(out, OUT)
