# SPDX-License-Identifier: Apache-2.0
"""What the modules of all frameworks do alike; they differ in how they hold arrays."""

from typing import Any, TypeVar

from jax import Array

from jax_smfree._src.group import EpGroup
from jax_smfree._src.group_axis import Axis
from jax_smfree.nn.on_mesh import moe_layer_on_mesh
from jax_smfree.nn.params import MoeParams
from jax_smfree.nn.specs import moe_specs

_Bias = TypeVar("_Bias")


def call(
    group: EpGroup,
    params: MoeParams,
    x: Array,
    *,
    routes: Any,
    balance_bias: Array | None,
    fsdp_axis: Axis | None,
    tensor_axis: Axis | None,
    **others: Any,
) -> Any:
    """`moe_layer_on_mesh` with parameters that are where `init_moe_on_mesh` makes them."""
    return moe_layer_on_mesh(
        group,
        params,
        x,
        routes=routes,
        balance_bias=balance_bias if routes is None else None,
        params_spec=moe_specs(params, group.axis, fsdp_axis=fsdp_axis, tensor_axis=tensor_axis),
        tensor_axis=tensor_axis,
        **others,
    )


def bias_of_balanced(bias: _Bias | None) -> _Bias:
    """The bias of a ``MoeLayer`` that is to be updated, which has to have one."""
    if bias is None:
        raise ValueError(
            "MoeLayer.update_balance: got a layer without a bias, expected one that was made "
            "with balanced=True."
        )
    return bias
