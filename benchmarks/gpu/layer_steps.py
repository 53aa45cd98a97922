# SPDX-License-Identifier: Apache-2.0
"""The layers that ``layer`` measures, and what each keeps for its backward pass."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax import Array

import jax_smfree as smfree
from benchmarks.gpu import moe
from benchmarks.gpu.cases import GpuShape
from benchmarks.gpu.library import Library
from benchmarks.results import Json
from jax_smfree import nn

DEFAULT, ALL_GATHER = "default", "all_gather"
POLICIES = {
    "both policies": jax.checkpoint_policies.save_from_both_policies(
        smfree.save_comm_policy, nn.save_mlp_policy
    ),
    "save_comm_policy": smfree.save_comm_policy,
    "save_mlp_policy": nn.save_mlp_policy,
}


def layers(library: Library, shape: GpuShape) -> dict[str, moe.Layer]:
    """The library's, with the lines of docs/moe_layer.md, and JAX's all_gather one."""

    def ours(weight_on: nn.WeightOn, params: nn.MoeParams, x: Array) -> Array:
        return nn.moe_layer(library.group.token(), params, x, weight_on=weight_on)[1]

    output, hidden = functools.partial(ours, "output"), functools.partial(ours, "hidden")
    return {
        DEFAULT: output,
        ALL_GATHER: functools.partial(moe.gathered_layer, shape),
        "hidden": hidden,
        **{
            f"hidden, {name}": jax.checkpoint(hidden, policy=policy)
            for name, policy in POLICIES.items()
        },
        "nothing kept": jax.checkpoint(output),
    }


def kept(model: moe.Model, layer: moe.Layer, shape: GpuShape) -> Json:
    """Bytes per rank that ``jax.vjp`` keeps, and those of arrays of received rows among them.

    Without parameters and the input: they are recognised as what the traced program was given, or,
    where the shared expert has been ordered after a send, by shape and dtype.
    """
    mapped, operands = model.mapped(layer), model.operands

    def forward(*operands: Any) -> list[Array]:
        residuals: list[Array] = jax.tree.leaves(jax.vjp(mapped, *operands)[1])
        return residuals

    traced = jax.make_jaxpr(forward)(*operands).jaxpr
    inputs = {id(v) for v in traced.invars}
    residuals = {id(v): v.aval for v in traced.outvars if id(v) not in inputs}
    given = {
        (value.sharding.shard_shape(value.shape), value.dtype)
        for value in jax.tree.leaves(operands)
    }
    everything = of_rows = 0
    for aval in residuals.values():  # of all ranks, one after the other
        shape_here = (aval.shape[0] // shape.ranks, *aval.shape[1:])
        if (shape_here, aval.dtype) not in given:
            size = int(np.prod(shape_here)) * aval.dtype.itemsize
            everything += size
            of_rows += size if shape_here[0] == shape.capacity else 0
    return {"kept_bytes": everything, "kept_of_rows_bytes": of_rows}


def memory(executable: Any) -> Json:
    """Of each device, as XLA has planned it: all is allocated before the program runs."""
    planned = executable.memory_analysis()
    return {
        "argument_bytes": planned.argument_size_in_bytes,
        "output_bytes": planned.output_size_in_bytes,
        "temporary_bytes": planned.temp_size_in_bytes,
    }
