# SPDX-License-Identifier: Apache-2.0
"""All that differs between JAX versions or is not public. No other file touches ``jax._src``."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import dispatch, distributed
from jax._src.interpreters import partial_eval as pe
from jax._src.interpreters import remat
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec

ShapedArray = jax.core.ShapedArray


def manual_axes() -> frozenset[str]:
    """The mesh axes that the enclosing ``jax.shard_map`` made manual; empty outside of one."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def aval_like(like: Any, shape: Sequence[int], dtype: Any) -> Any:
    """An abstract value with the mesh and the varying axes of ``like``."""
    sharding = like.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return like.update(shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding)


def varying_axes(value: Any) -> tuple[str, ...]:
    """The manual axes that ``value`` varies over; always none under ``check_vma=False``."""
    return tuple(jax.typeof(value).mat.varying)


def varying(value: Any, axes: tuple[str, ...]) -> Any:
    """``value``, marked as varying over the manual ``axes`` (matters under ``check_vma=True``)."""
    missing = tuple(a for a in axes if a not in varying_axes(value))
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def impl(primitive: Primitive) -> None:
    """Lets ``primitive`` run eagerly, by compiling it alone."""
    primitive.def_impl(functools.partial(dispatch.apply_primitive, primitive))


def set_dce_rule(primitive: Primitive, keep: Callable[[Sequence[bool], Any], Any]) -> None:
    """``keep(used_outputs, eqn)`` returns ``(used_inputs, eqn or None)``."""

    # (used, eqn) up to jax 0.11, (used, live_ins, eqn) from 0.12 on.
    pe.dce_rules[primitive] = lambda used, *rest: keep(used, rest[-1])


def set_remat3_rule(
    primitive: Primitive, run: Callable[..., tuple[Any, Any]], run_again: Callable[..., Any]
) -> None:
    """What ``jax.checkpoint`` does with ``primitive`` where ``jax_remat3`` is set.

    In the forward pass ``run(policy, *operands, **params)`` returns its results and what is kept of
    them; in the backward pass ``run_again(kept, *operands, **params)`` returns its results.
    """
    # The first argument is the policy in jax 0.10 and has it since; what is kept is a result of its
    # own, and an argument of what runs again, since 0.12.
    hands_over = "res" in remat.RematTrace.process_primitive.__code__.co_varnames

    def rule(policy: Any, *operands: Any, **params: Any) -> Any:
        policy = policy.policy if isinstance(policy, remat.RematTrace) else policy
        out, kept = run(policy, *operands, **params)
        again = functools.partial(run_again, **params)
        return (out, kept, again) if hands_over else (out, functools.partial(again, kept))

    remat.rules[primitive] = rule


def is_saved(policy_result: Any) -> bool:
    """Whether a ``jax.checkpoint`` policy's answer means that the value is kept (or offloaded)."""
    return policy_result is not False and not isinstance(policy_result, pe.RecomputeType)


def is_compile_only(device: Any) -> bool:
    """Whether ``device`` belongs to a topology that one compiles for without having it."""
    return "CompileOnly" in type(device.client).__name__


def distributed_client() -> Any | None:
    """The key-value store of ``jax.distributed``, or ``None`` before it was initialised."""
    return distributed.global_state.client
