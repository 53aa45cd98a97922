# SPDX-License-Identifier: Apache-2.0
"""Two MoE layers, forward and backward, for compute-sanitizer, under which everything is slow.

Four ranks are two nodes, in hierarchical mode.

    compute-sanitizer --report-api-errors no python tests/gpu/sanitize.py

(That peer access is enabled already is no error of the kernels.) No collective of NCCL takes part.
"""

import dataclasses
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import jax_smfree as smfree
from support import as_many, block, ep_mesh, make_problem


def main():
    mesh = ep_mesh(as_many(4))
    problem = make_problem(mesh, tokens=33, top_k=3, hidden=40)
    sizes = {"num_experts": 8, "top_k": 3, "hidden": 40, "max_tokens": 40}
    sizes["ranks_per_node"] = 2 if mesh.size == 4 else None
    config = smfree.EpConfig(**sizes, dtype=jnp.float32, expert_alignment=4, timeout_s=300)
    with (
        smfree.EpGroup.create(mesh, config=config) as pushing,
        smfree.EpGroup.create(mesh, config=dataclasses.replace(config, sm_push_bytes=0)) as copying,
    ):

        def local(x, *arrays):
            for group in (pushing, copying):
                x = block(smfree, group.token(), x, *arrays)[1]
            return x

        smap = jax.shard_map(local, mesh=mesh, in_specs=problem.specs, out_specs=problem.rows)
        step = jax.jit(jax.grad(lambda *arrays: jnp.sum(smap(*arrays) ** 2), (0, 2)))
        gradients = step(*problem.arrays)
        pushing.check()
        copying.check()
        assert all(np.isfinite(np.asarray(gradient)).all() for gradient in gradients)
    print(f"{mesh.size} ranks on {mesh.devices.flat[0].device_kind}: done")


if __name__ == "__main__":
    main()
