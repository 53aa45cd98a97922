# SPDX-License-Identifier: Apache-2.0
"""What `test_two_hosts` runs in a pytest on each host; no file that pytest collects by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_smfree as smfree
from jax_smfree import nn
from jax_smfree._src import bootstrap
from nn.functional import config, functional, rows_on
from support import assert_trees_close, ep_mesh

pytestmark = pytest.mark.multihost(processes=2, devices_per_process=2)


def test_which_backend(world):
    """That of the mesh, not of the job: on the devices of one host it is the usual one."""
    hosts = world.exchange(bootstrap.host_name())
    assert hosts == ["hostA", "hostB"]
    sizes = smfree.EpConfig(**config())
    why = "process 0 on host 'hostA' and of process 1 on 'hostB', where the CPU backend"
    with pytest.warns(UserWarning, match=why) as told:
        over_both = smfree.EpGroup.create(ep_mesh(4), config=sizes)
    assert told[0].filename == __file__
    with over_both:
        assert (over_both.backend, over_both.config.mode) == ("portable", "hierarchical")
    within = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "ep"))
    with smfree.EpGroup.create(within, config=sizes) as group:
        assert group.backend == "cpu"
    world.barrier()


def test_moe_layer(groups, world):
    """Forward and with all gradients, against plain jax.numpy."""
    group = groups(ep_mesh(4), **config())
    assert group.backend == "portable"
    params = nn.init_moe_on_mesh(jax.random.key(0), group, expert_width=16)
    x = rows_on(group)

    def of_this_process(layer):
        value_and_grad = jax.value_and_grad(
            lambda params, x: jnp.sum((x + layer(params, x)) ** 2), argnums=(0, 1)
        )
        found = jax.jit(value_and_grad)(params, x)
        return jax.tree.map(lambda a: [np.asarray(s.data) for s in a.addressable_shards], found)

    actual = of_this_process(lambda *arrays: nn.moe_layer_on_mesh(group, *arrays)[0])
    assert_trees_close(actual, of_this_process(lambda *arrays: functional(group, *arrays)))
    world.barrier()
