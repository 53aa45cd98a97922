# SPDX-License-Identifier: Apache-2.0
"""How the parameters of a layer are split over a mesh, and how a device gets what it computes with.

An MLP may have H split between the steps (FSDP), and F while it computes (tensor parallelism):
then every device has a part of the hidden values, and so a summand of the result.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jax_smfree._src import arguments, group_axis
from jax_smfree._src.group_axis import Axis
from jax_smfree.nn.params import MlpParams, MoeParams


def moe_specs(
    params: MoeParams, axis: Axis, *, fsdp_axis: Axis | None = None, tensor_axis: Axis | None = None
) -> MoeParams:
    """The ``PartitionSpec`` of every parameter: experts over ``axis``, the rest replicated.

    Layers that are stacked for a ``jax.lax.scan`` have an axis before the others, which is not
    split. Parameters of a user's own experts are split along their first axis, by ``axis`` alone.

    Args:
      params: from `init_moe`, or their shapes.
      axis: the axis, or axes, of the group.
      fsdp_axis: further mesh axes, over which H of the MLPs is split between the steps (FSDP).
      tensor_axis: further mesh axes, over which F of the MLPs is split (tensor parallelism).

    Raises:
      ValueError, TypeError: for what is no `MoeParams` or names no axes.

    Example:
      >>> specs = nn.moe_specs(params, "ep", fsdp_axis="data")
      >>> specs.router, specs.experts.gate, specs.shared.down
      (P(), P('ep', 'data'), P(None, 'data'))
    """
    arguments.instance("moe_specs", "params", params, MoeParams, "Make it with nn.init_moe.")
    axis = group_axis.checked("moe_specs", axis)
    for name, value in (("fsdp_axis", fsdp_axis), ("tensor_axis", tensor_axis)):
        if not all(isinstance(each, str) for each in as_tuple(value)):
            raise TypeError(
                f"moe_specs: got {name}={arguments.shown(value)}, expected the name of an axis."
            )
    router = params.router
    layers = (None,) * (0 if router is None else np.ndim(router) - 2)

    def of(value: Any, *first: Any) -> Any:
        """The spec of an array, or the specs of a whole MLP."""
        if not isinstance(value, MlpParams):
            return _spec(*first)
        wide, long = _spec(*first, fsdp_axis, tensor_axis), _spec(*first, tensor_axis)
        specs: dict[str, Any] = {
            "gate": wide,
            "up": wide,
            "down": _spec(*first, tensor_axis, fsdp_axis),
            "gate_bias": long,
            "up_bias": long,
            "down_bias": _spec(*first),
        }
        given = {name for name, array in vars(value).items() if array is not None}
        of_given: dict[str, Any] = {n: s if n in given else None for n, s in specs.items()}
        return MlpParams(**of_given)

    def of_all(tree: Any, *first: Any) -> Any:
        return _map_mlps(lambda value: of(value, *first), tree)

    replicated: MoeParams = jax.tree.map(lambda _: _spec(), params)
    experts, shared = of_all(params.experts, *layers, axis), of_all(params.shared, *layers)
    return dataclasses.replace(replicated, experts=experts, shared=shared)


def gathered(
    params: MoeParams, specs: MoeParams, axis: Axis, kept: tuple[str, ...], dtype: DTypeLike
) -> MoeParams:
    """Inside of ``jax.shard_map``: parameters split over the group's axis and ``kept`` alone.

    MLPs are cast first, so that they travel as the layer needs them. The transpose sums gradients
    and scatters them.
    """
    group_axes = as_tuple(axis)

    def gather(array: Any, spec: PartitionSpec, of_experts: bool) -> Any:
        for dim, entry in enumerate(spec):
            stay = (*kept, *group_axes) if of_experts and dim == 0 else kept
            names = tuple(name for name in as_tuple(entry) if name not in stay)
            if names and as_tuple(entry)[-len(names) :] != names:
                raise ValueError(
                    f"moe_layer_on_mesh: got {spec} in params_spec, expected {names[0]!r} behind "
                    "the axes that stay split, so that what a device gathers are neighbours."
                )
            if names:
                array = jax.lax.all_gather(array, names, axis=dim, tiled=True)
        return array

    cast = dataclasses.replace(
        params, experts=_cast(params.experts, dtype), shared=_cast(params.shared, dtype)
    )
    of_experts = jax.tree.map(lambda _: False, cast)
    of_experts = dataclasses.replace(of_experts, experts=jax.tree.map(lambda _: True, cast.experts))
    whole: MoeParams = jax.tree.map(gather, cast, specs, of_experts)
    return whole


def once_over(params: MoeParams, axes: tuple[str, ...]) -> MoeParams:
    """The last bias of every MLP on the first device along ``axes`` alone: results are summed."""
    if not axes:
        return params

    def once(value: Any) -> Any:
        if not isinstance(value, MlpParams) or value.down_bias is None:
            return value
        is_first = jax.lax.axis_index(axes) == 0
        bias = jnp.where(is_first, value.down_bias, jnp.zeros((), value.down_bias.dtype))
        return dataclasses.replace(value, down_bias=bias)

    experts, shared = _map_mlps(once, params.experts), _map_mlps(once, params.shared)
    return dataclasses.replace(params, experts=experts, shared=shared)


def check_specs(where: str, specs: MoeParams, params: MoeParams) -> None:
    """One for every parameter."""
    arguments.instance(where, "params_spec", specs, MoeParams, "Make it with nn.moe_specs.")
    structures: list[Any] = [jax.tree.structure(tree) for tree in (specs, params)]
    is_spec = [isinstance(leaf, PartitionSpec) for leaf in jax.tree.leaves(specs)]
    if not all(is_spec) or structures[0] != structures[1]:
        raise ValueError(
            f"{where}: got {arguments.shown(specs)} as params_spec, expected a PartitionSpec for "
            "every array in params. Make it with nn.moe_specs(params, group.axis)."
        )


def as_tuple(axes: Any) -> tuple[str, ...]:
    """The names in an entry of a ``PartitionSpec``, or in an argument that is like one."""
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)


def _spec(*entries: Any) -> PartitionSpec:
    """Without the entries at the end that split nothing."""
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return PartitionSpec(*entries)


def _map_mlps(function: Callable[[Any], Any], tree: Any) -> Any:
    """``function`` of every `MlpParams` in ``tree``, as a whole, and of every other array."""
    return jax.tree.map(function, tree, is_leaf=lambda value: isinstance(value, MlpParams))


def _cast(tree: Any, dtype: DTypeLike) -> Any:
    """The MLPs in ``tree`` with parameters of ``dtype``; others know what they need."""

    def cast(value: Any) -> Any:
        if not isinstance(value, MlpParams):
            return value
        return jax.tree.map(lambda array: array.astype(dtype), value)

    return _map_mlps(cast, tree)
