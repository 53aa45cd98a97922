# SPDX-License-Identifier: Apache-2.0
"""Runs a program whose ranks fail, and tells what each of them said."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from support import Problem, ep_mesh, make_problem

RANKS = 4
CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      errors: the error of each rank, ``None`` for one that had none.
      seconds: from the start to the end of the last rank.
      out: what the program returned, whole only without errors.
    """

    errors: list[str | None]
    seconds: float
    out: Any


def compiled(group: smfree.EpGroup, local: Callable[..., Any], problem: Problem) -> Any:
    """``local(token, x, topk_idx, topk_weights)`` on every rank, compiled."""

    def with_token(*arrays):
        return local(group.token(), *arrays)

    smap = jax.shard_map(with_token, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep"))
    return jax.jit(smap).lower(*problem.arrays[:3]).compile()


def run(
    group: smfree.EpGroup, local: Callable[..., Any], problem: Problem | None = None
) -> Outcome:
    """Runs `compiled` once, to the end of every rank."""
    problem = problem or make_problem(group.mesh)
    step = compiled(group, local, problem)
    start = time.monotonic()
    out = step(*problem.arrays[:3])
    errors = [error_of(shard.data) for shard in jax.tree.leaves(out)[0].addressable_shards]
    return Outcome(errors, time.monotonic() - start, out)


def error_of(array: jax.Array) -> str | None:
    """Waits for an array; what JAX raises is a JaxRuntimeError, or it is a bug."""
    try:
        array.block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return None


def round_trip(token, x, topk_idx, topk_weights):
    d, token = smfree.dispatch(token, x, topk_idx, topk_weights)
    return smfree.combine(token, d, d.x)[0]


def assert_works(group: smfree.EpGroup) -> None:
    """A round trip through identical experts is a multiplication by the sum of the weights."""
    problem = make_problem(group.mesh)
    outcome = run(group, round_trip, problem)
    assert outcome.errors == [None] * group.num_ranks
    x, idx, weights, _ = (np.asarray(a, np.float64) for a in problem.arrays)
    scale = np.sum(weights * (idx >= 0), axis=1, keepdims=True)
    np.testing.assert_allclose(outcome.out, x * scale, rtol=1e-5, atol=1e-6)
    group.check()


def assert_a_new_group_works() -> None:
    with smfree.EpGroup.create(ep_mesh(RANKS), config=smfree.EpConfig(**CONFIG)) as group:
        assert_works(group)
