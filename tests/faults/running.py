# SPDX-License-Identifier: Apache-2.0
"""Runs a program whose ranks fail, and tells what each of them said."""

import dataclasses
import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from support import Problem, as_many, backend, ep_mesh, make_problem

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      errors: the error of each rank, ``None`` for one that had none.
      seconds: from the start to the end of the last rank.
      out: what the program returned, whole only without errors; ``None`` if it did not start.
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
    try:
        out = step(*problem.arrays[:3])
        errors = [error_of(shard) for shard in shards_of(out)]
    except Exception as error:  # of a GPU that refuses a phase; the type follows from the status
        out, errors = None, [str(error)] * group.num_ranks
    return Outcome(errors, time.monotonic() - start, out)


def shards_of(out: Any) -> list[jax.Array]:
    """The part of each rank in the first array of ``out``."""
    return [shard.data for shard in jax.tree.leaves(out)[0].addressable_shards]


def error_of(array: jax.Array) -> str | None:
    """Waits for an array; what JAX raises is a JaxRuntimeError, or it is a bug."""
    try:
        array.block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return None


def assert_failed(error: str | None, result: jax.Array | None, pattern: str) -> None:
    """What a rank that met a fault has to show.

    On the CPU that is an error that matches ``pattern``. The phases of a GPU run after their call
    has returned: the result is NaN, unless the fault was known before the last phase was launched.
    """
    if backend() == "cpu":
        assert error is not None and re.search(pattern, error), (error, pattern)
    elif error is None:
        assert np.isnan(result).all()


def assert_fault(
    group: smfree.EpGroup,
    outcome: Outcome,
    pattern: str,
    words: Sequence[str],
    ranks: Collection[int] | None = None,
) -> None:
    """The given ``ranks`` (default: all) failed and the others did not; `check` says why.

    ``pattern`` is what each failed rank raises on the CPU; for it and ``words`` see `assert_told`.
    """
    ranks = range(group.num_ranks) if ranks is None else ranks
    results = [None] * group.num_ranks if outcome.out is None else shards_of(outcome.out)
    for rank, (error, result) in enumerate(zip(outcome.errors, results, strict=True)):
        if rank in ranks:
            assert_failed(error, result, pattern)
        elif result is not None:
            assert error is None and np.isfinite(result).all()
    assert_told(group, pattern, words)


def assert_told(group: smfree.EpGroup, pattern: str, words: Sequence[str]) -> None:
    """`check` raises a text with all ``words``, and on the CPU one that matches ``pattern``."""
    with pytest.raises(smfree.SmfreeError, match=pattern if backend() == "cpu" else None) as told:
        group.check()
    for word in words:
        assert re.search(word, str(told.value)), (word, told.value)


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
    mesh = ep_mesh(as_many(4))
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        assert_works(group)
