# SPDX-License-Identifier: Apache-2.0
"""Groups along the other axes of a mesh, with a rank in each process: one world, several groups."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from support import devices, make_problem

CONFIG = {"num_experts": 8, "top_k": 3, "hidden": 16, "max_tokens": 6, "dtype": np.float32}
FOUR = {"processes": 4, "devices_per_process": 1}


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(axes, marks=[mark, pytest.mark.multihost(**FOUR, platform=platform)])
        for axes in (("data", "ep"), ("ep", "data"))
        for mark, platform in ((pytest.mark.cpu_only, "cpu"), (pytest.mark.cuda_only, "cuda"))
    ],
    ids=lambda axes: ",".join(axes),
)
def test_each_coordinate_is_a_group(groups, axes, world):
    """Every expert multiplies by a number of its own; rows of other groups would be seen."""
    mesh = Mesh(devices(4).reshape(2, 2), axes)
    group = groups(mesh, **CONFIG)
    problem = make_problem(mesh, top_k=CONFIG["top_k"])
    x, topk_idx, topk_weights = (
        np.concatenate([np.asarray(shard.data) for shard in array.addressable_shards])
        for array in problem.arrays[:3]
    )

    def local(x, topk_idx, topk_weights):
        d, token = smfree.dispatch(group.token(), x, topk_idx, topk_weights)
        y = d.x * (1 + jax.lax.axis_index("ep"))
        return smfree.combine(token, d, y)[0]

    specs = P(mesh.axis_names)
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))
    (out,) = (np.asarray(shard.data) for shard in step(*problem.arrays[:3]).addressable_shards)
    factors = np.where(topk_idx < 0, 0, 1 + topk_idx // (CONFIG["num_experts"] // 2))
    expected = x * np.sum(topk_weights * factors, axis=1, keepdims=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    world.barrier()
