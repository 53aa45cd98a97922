# SPDX-License-Identifier: Apache-2.0
"""Groups along one axis of a mesh or over all, with a rank in each process."""

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
    ("axes", "axis"),
    [
        pytest.param(axes, axis, marks=[mark, pytest.mark.multihost(**FOUR, platform=platform)])
        for axes, axis in (
            (("data", "ep"), "ep"),
            (("ep", "data"), "ep"),
            (("a", "b"), ("b", "a")),
        )
        for mark, platform in ((pytest.mark.cpu_only, "cpu"), (pytest.mark.cuda_only, "cuda"))
    ],
    ids=lambda names: names if isinstance(names, str) else ",".join(names),
)
def test_each_coordinate_is_a_group(groups, axes, axis, world):
    """Every expert multiplies by a number of its own; rows of other groups would be seen."""
    mesh = Mesh(devices(4).reshape(2, 2), axes)
    # In hierarchical mode ranks of a host would have to follow one another along the axis.
    group = groups(mesh, axis, **CONFIG, mode="direct")
    problem = make_problem(mesh, top_k=CONFIG["top_k"])
    x, topk_idx, topk_weights = (
        np.concatenate([np.asarray(shard.data) for shard in array.addressable_shards])
        for array in problem.arrays[:3]
    )

    def local(x, topk_idx, topk_weights):
        d, token = smfree.dispatch(group.token(), x, topk_idx, topk_weights)
        y = d.x * (1 + jax.lax.axis_index(axis))
        return smfree.combine(token, d, y)[0]

    specs = P(mesh.axis_names)
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))
    (out,) = (np.asarray(shard.data) for shard in step(*problem.arrays[:3]).addressable_shards)
    factors = np.where(topk_idx < 0, 0, 1 + topk_idx // (CONFIG["num_experts"] // group.num_ranks))
    expected = x * np.sum(topk_weights * factors, axis=1, keepdims=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    world.barrier()


@pytest.mark.cpu_only
@pytest.mark.multihost(processes=2, devices_per_process=2)
def test_nodes_lie_along_the_last_axes(groups, world):
    """A process is a node: its ranks follow one another in one order of the axes only."""
    mesh = Mesh(devices(4).reshape(2, 2), ("process", "device"))
    group = groups(mesh, ("process", "device"), **CONFIG)
    assert (group.config.mode, group.config.ranks_per_node) == ("hierarchical", 2)
    with pytest.raises(ValueError, match="nodes of one size whose ranks follow one another"):
        groups(mesh, ("device", "process"), **CONFIG)
    world.barrier()
