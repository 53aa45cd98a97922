# SPDX-License-Identifier: Apache-2.0
"""All that differs between JAX versions or is not public. No other file touches ``jax._src``."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.monitoring
from jax._src import core, dispatch, distributed
from jax._src.interpreters import partial_eval as pe
from jax._src.interpreters import remat
from jax.extend.core import Primitive
from jax.interpreters import batching
from jax.sharding import Mesh, PartitionSpec

ShapedArray = jax.core.ShapedArray


def manual_axes() -> frozenset[str]:
    """The mesh axes that the enclosing ``jax.shard_map`` made manual; empty outside of one."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def mesh_shape() -> dict[str, int]:
    """Axis and sizes of the mesh around the call, in a ``jax.shard_map`` of all of its mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def lowering_mesh(ctx: Any) -> Mesh | None:
    """The mesh of devices that a primitive is lowered for, where the ``jax.shard_map`` knows it."""
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def is_export(ctx: Any) -> bool:
    """Whether a primitive is lowered for ``jax.export``."""
    return bool(ctx.module_context.lowering_parameters.for_export)


def is_nvidia(device: Any) -> bool:
    """Whether ``device`` is a GPU of NVIDIA; JAX says ``"gpu"`` of others too."""
    version = device.client.platform_version.lower()  # without "cuda" where one only compiles
    return device.platform == "gpu" and ("cuda" in version or "nvidia" in version)


def aval_like(like: Any, shape: Sequence[int], dtype: Any, axes: frozenset[str]) -> Any:
    """An abstract value on the mesh of ``like`` that varies over the manual ``axes``."""
    sharding = like.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    varying = type(like.mat)(varying=axes)
    return like.update(
        shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding,
        manual_axis_type=varying,
    )  # fmt: skip


def varying_axes(value: Any) -> frozenset[str]:
    """The manual axes that ``value`` varies over; always none under ``check_vma=False``."""
    return frozenset(jax.typeof(value).mat.varying)


def varying(value: Any, axes: Iterable[str]) -> Any:
    """``value``, marked as varying over the manual ``axes`` (matters under ``check_vma=True``).

    Inside of ``jax.vmap(..., spmd_axis_name=axis)`` types do not tell whether a value varies over
    that axis; there a batching rule marks it, `varying_too`.
    """
    return varying_too(value, frozenset(axes) - core.get_axis_env().spmd_axis_names)


def varying_too(value: Any, axes: frozenset[str]) -> Any:
    """`varying`, of all ``axes``."""
    # In one order in all processes: the transpose is a psum over them.
    missing = tuple(sorted(axes - varying_axes(value)))
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def summed_over(value: Any, axes: frozenset[str]) -> Any:
    """The sum over the manual ``axes`` that ``value`` varies over."""
    return jax.lax.psum(value, tuple(sorted(axes))) if axes else value


def impl(primitive: Primitive) -> None:
    """Lets ``primitive`` run eagerly, by compiling it alone."""
    primitive.def_impl(functools.partial(dispatch.apply_primitive, primitive))


def set_batch_rule(primitive: Primitive, batch: Callable[..., Any]) -> None:
    """``batch(spmd_axes, operands, dims, **params)`` returns ``(outputs, dims)``.

    ``spmd_axes`` are the mesh axes that the ``jax.vmap`` splits its batch over.
    """

    def rule(axis_data: Any, operands: Any, dims: Any, **params: Any) -> Any:
        if all(dim is None for dim in dims):
            out = primitive.bind(*operands, **params)
            return out, [None] * len(out)
        return batch(frozenset(axis_data.spmd_name or ()), operands, dims, **params)

    batching.fancy_primitive_batchers[primitive] = rule


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


def replays_whole_functions() -> bool:
    """Whether ``jax.checkpoint`` replays a ``jax.custom_jvp`` without a look inside."""
    return bool(getattr(jax.config, "jax_remat3", False))


def is_saved(policy_result: Any) -> bool:
    """Whether a ``jax.checkpoint`` policy's answer means that the value is kept (or offloaded)."""
    return policy_result is not False and not isinstance(policy_result, pe.RecomputeType)


def on_compilation(begins: Callable[[], None], ends: Callable[[], None]) -> None:
    """Calls ``begins`` and ``ends`` around every compilation, on the thread that waits for it."""

    def begin(event: str, value: float, **_: str | int) -> None:
        if event == dispatch.BACKEND_COMPILE_EVENT:
            begins()

    def end(event: str, duration_secs: float, **_: str | int) -> None:
        if event == dispatch.BACKEND_COMPILE_EVENT:
            ends()

    jax.monitoring.register_scalar_listener(begin)
    jax.monitoring.register_event_duration_secs_listener(end)


def is_compile_only(device: Any) -> bool:
    """Whether ``device`` belongs to a topology that one compiles for without having it."""
    return "CompileOnly" in type(device.client).__name__


def distributed_client() -> Any | None:
    """The key-value store of ``jax.distributed``, or ``None`` before it was initialised."""
    return distributed.global_state.client
