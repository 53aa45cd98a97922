# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layers, as functions to call inside ``jax.shard_map``, or on global arrays.

init_moe, moe_specs              parameters of a layer, and how to shard them
moe_layer                        router, experts, and a shared expert while the rows move
moe_two_batches                  two micro-batches that hide each other's movement
moe_layer_on_mesh,               the layer on global arrays; of it are the modules for
init_moe_on_mesh,                Flax NNX and Equinox, jax_smfree.nn.{nnx,equinox}
init_balance_bias_on_mesh
RouterConfig, route, Routes,     the routers of all common models, and balance for benchmarks
balanced_routes
load_balancing_loss,             losses that keep the experts equally busy and the logits small
router_z_loss
update_balance_bias,             the same without a loss
quantile_balance_bias
expert_load, load_metrics        how busy the experts are
ExpertPlacement, plan_placement, redundant copies of busy experts
move_parameters, spread
grouped_mlp, mlp,                the compute of the experts: ready ones, and their activations
sigmoid_gated_mlp, local_expert,
swiglu, geglu, clamped_swiglu,
relu_squared
save_mlp_policy                  what jax.checkpoint keeps of them
grouped_matmul, block_matmul     what they multiply with
ReferenceGroup                   in place of an EpGroup, for ``implementation="reference"``
"""

from jax_smfree._src.reference import Group as ReferenceGroup
from jax_smfree.nn.activations import Activation, clamped_swiglu, geglu, relu_squared, swiglu
from jax_smfree.nn.balance import (
    expert_load,
    load_balancing_loss,
    load_metrics,
    quantile_balance_bias,
    router_z_loss,
    update_balance_bias,
)
from jax_smfree.nn.experts import Experts, grouped_mlp, local_expert, save_mlp_policy
from jax_smfree.nn.layer import LayerOptions, MoeAux, moe_layer
from jax_smfree.nn.matmul import GroupedMatmul, block_matmul, grouped_matmul
from jax_smfree.nn.micro_batches import moe_two_batches
from jax_smfree.nn.on_mesh import (
    init_balance_bias_on_mesh,
    init_moe_on_mesh,
    moe_layer_on_mesh,
)
from jax_smfree.nn.operations import Implementation
from jax_smfree.nn.params import MlpParams, MoeParams, SigmoidGatedParams, init_mlp, init_moe
from jax_smfree.nn.physical import ExpertPlacement, move_parameters, plan_placement, spread
from jax_smfree.nn.router import RouterConfig, Routes, balanced_routes, route
from jax_smfree.nn.shared import Shared, mlp, sigmoid_gated_mlp
from jax_smfree.nn.specs import moe_specs
from jax_smfree.nn.steps import WeightOn

__all__ = [
    "Activation",
    "ExpertPlacement",
    "Experts",
    "GroupedMatmul",
    "Implementation",
    "LayerOptions",
    "MlpParams",
    "MoeAux",
    "MoeParams",
    "ReferenceGroup",
    "RouterConfig",
    "Routes",
    "Shared",
    "SigmoidGatedParams",
    "WeightOn",
    "balanced_routes",
    "block_matmul",
    "clamped_swiglu",
    "expert_load",
    "geglu",
    "grouped_matmul",
    "grouped_mlp",
    "init_balance_bias_on_mesh",
    "init_mlp",
    "init_moe",
    "init_moe_on_mesh",
    "load_balancing_loss",
    "load_metrics",
    "local_expert",
    "mlp",
    "moe_layer",
    "moe_layer_on_mesh",
    "moe_specs",
    "moe_two_batches",
    "move_parameters",
    "plan_placement",
    "quantile_balance_bias",
    "relu_squared",
    "route",
    "router_z_loss",
    "save_mlp_policy",
    "sigmoid_gated_mlp",
    "spread",
    "swiglu",
    "update_balance_bias",
]
