# SPDX-License-Identifier: Apache-2.0
"""Two MoE layers, forward and backward, for ``compute-sanitizer python tests/gpu/sanitize.py``."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

import jax_smfree as smfree
from support import as_many, block, ep_mesh, make_problem


def main():
    mesh = ep_mesh(as_many(4))
    problem = make_problem(mesh, tokens=33, top_k=3, hidden=40)
    config = smfree.EpConfig(
        num_experts=8, top_k=3, hidden=40, max_tokens=40, dtype=jnp.float32, expert_alignment=4
    )
    with smfree.EpGroup.create(mesh, config=config) as group:

        def local(x, *arrays):
            token = group.token()
            for _ in range(2):
                token, x = block(smfree, token, x, *arrays)
            return x

        smap = jax.shard_map(local, mesh=mesh, in_specs=problem.specs, out_specs=problem.rows)
        step = jax.jit(jax.grad(lambda *arrays: jnp.sum(smap(*arrays) ** 2), (0, 2, 3)))
        gradients = step(*problem.arrays)
        group.check()
        assert all(bool(jnp.isfinite(gradient).all()) for gradient in gradients)
    print(f"{mesh.size} ranks on {mesh.devices.flat[0].device_kind}: done")


if __name__ == "__main__":
    main()
