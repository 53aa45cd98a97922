# SPDX-License-Identifier: Apache-2.0
"""What runs in every process of the hosts while the network, or one of them, goes wrong."""

import math
import time
import warnings
from typing import Any

import numpy as np

HEARTBEAT_S = 10
# For how long a process is waited for after the deadline: it looks for faults, closes its group.
GRACE_S = 1.0
# Of the groups; a portable one is what CPU devices of several hosts get.
MODES: dict[str, dict[str, Any]] = {
    "portable": {},
    # Operations of any size announce their counts, and their rows go into areas.
    "direct": {"mode": "direct", "ranks_per_node": 1, "sm_push_bytes": 0},
    "many rows": {"mode": "direct", "ranks_per_node": 1, "sm_push_bytes": 0, "max_tokens": 4096},
    "device": {"mode": "direct", "ranks_per_node": 1, "puts": "device"},
    "hierarchical": {"mode": "hierarchical", "ranks_per_node": 2},
}
SIZES = {"num_experts": 8, "top_k": 2, "hidden": 256, "max_tokens": 128, "dtype": np.float32}


def runs(
    mode: str, steps: int, timeout_s: float, leaver: int = -1, lost: int = -1, directory: str = ""
) -> None:
    """Checks the result of each step; tells how many there were, or the error that ended them.

    ``leaver`` is a process that closes its group and goes after half a second. ``lost`` is one
    that will be killed: then JAX lets nobody end in order, and the others say so in ``directory``.
    """
    from jax_smfree import testing

    testing.initialize(**({"heartbeat_timeout_seconds": HEARTBEAT_S} if mode == "portable" else {}))
    import jax

    import jax_smfree as smfree
    from faults.running import compiled, round_trip
    from multiprocess.programs import leave, tell, telling_errors
    from support import ep_mesh, make_problem

    me = jax.process_index()
    mesh = ep_mesh(jax.device_count())
    config = smfree.EpConfig(**SIZES | MODES[mode], timeout_s=timeout_s)
    problem = make_problem(mesh, tokens=config.max_tokens, hidden=config.hidden)
    with warnings.catch_warnings(record=True):  # one that says why a group is portable
        group = smfree.EpGroup.create(mesh, config=config)
    step = compiled(group, round_trip, problem)
    expected = own(problem.x) * np.sum(
        own(problem.topk_weights) * (own(problem.topk_idx) >= 0), axis=1, keepdims=True
    )
    done, begin, leaves_at = 0, 0.0, math.inf
    try:
        with group, telling_errors():
            while done < steps and time.monotonic() < leaves_at:
                out = jax.block_until_ready(step(*problem.arrays[:3]))
                group.check()
                np.testing.assert_allclose(own(out), expected, rtol=1e-5, atol=1e-5)
                done += 1
                if done == 4:
                    begin = time.monotonic()
                    leaves_at = begin + 0.5 if me == leaver else math.inf
                    tell(runs=True)
            tell(steps=done, seconds=time.monotonic() - begin, ended_at=time.monotonic())
    except smfree.SmfreeError as error:
        tell(left_by=str(error))
    tell(closed_at=time.monotonic())
    if lost >= 0:
        leave(directory, [p for p in range(jax.process_count()) if p != lost])


def trains(mode: str, result: str, steps: int = 200) -> None:
    """Writes the losses of the first process, whose MoE block learns to imitate another one."""
    from jax_smfree import testing

    testing.initialize()
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import jax_smfree as smfree
    from support import block, ep_mesh, make_problem

    mesh = ep_mesh(jax.device_count())
    hidden = 64
    problem = make_problem(mesh, tokens=32, hidden=hidden)
    config = smfree.EpConfig(**SIZES | {"hidden": hidden}, **MODES[mode])
    with smfree.EpGroup.create(mesh, config=config) as group:

        def layer(x, topk_idx, topk_weights, kernel):
            return block(smfree, group.token(), x, topk_idx, topk_weights, kernel)[1]

        def local(kernel, target, *inputs):
            """A step of a rank with a kernel of its own: no collectives of XLA, see `Problem`."""
            loss, gradient = jax.value_and_grad(
                lambda kernel: jnp.mean((layer(*inputs, kernel) - target) ** 2)
            )(kernel)
            return kernel - 0.1 * gradient, loss[None]

        def each(function, number):
            specs = {"in_specs": (P("ep"),) * number, "out_specs": P("ep")}
            return jax.jit(jax.shard_map(function, mesh=mesh, **specs))

        inputs = problem.arrays[:3]
        kernel = each(lambda x: jnp.eye(hidden), 1)(problem.x)
        target = each(lambda *inputs: layer(*inputs, jnp.eye(hidden)[::-1]), 3)(*inputs)
        step, losses = each(local, 5), []
        for _ in range(steps):
            kernel, loss = step(kernel, target, *inputs)
            losses.append(loss)
        found = np.concatenate([own(loss) for loss in losses])
        group.check()
    if jax.process_index() == 0:
        np.save(result, found)


def own(array: Any) -> np.ndarray:
    """The rows of this process."""
    return np.concatenate([np.asarray(shard.data) for shard in array.addressable_shards])
