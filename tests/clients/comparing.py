# SPDX-License-Identifier: Apache-2.0
"""A layer over the ranks, forward and backward, and the comparison with a model's own block."""

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_smfree import nn


def forward_and_backward(
    group: Any, params: nn.MoeParams, options: dict[str, Any], x: np.ndarray, dout: np.ndarray
) -> tuple[jax.Array, nn.MoeParams, jax.Array]:
    """Output, gradients of the parameters, and gradient of ``x``, under ``jit``."""

    def on_each_rank(params: nn.MoeParams, x: jax.Array) -> jax.Array:
        return nn.moe_layer(group.token(), params, x, **options)[1]

    layer = jax.shard_map(
        on_each_rank,
        mesh=group.mesh,
        in_specs=(nn.moe_specs(params, "ep"), P("ep")),
        out_specs=P("ep"),
    )

    @jax.jit
    def run(params: nn.MoeParams, x: jax.Array, dout: jax.Array) -> Any:
        out, pullback = jax.vjp(layer, params, x)
        return out, *pullback(dout)

    return run(params, x, dout)


def assert_close(got: Any, want: Any) -> None:
    """To the rounding of float32: sums of up to 100 products of size 1, in another order."""

    def compare(path: Any, got: Any, want: Any) -> None:
        name = jax.tree_util.keystr(path)
        assert np.abs(want).max() > 0.01, f"{name}: nothing to compare"
        atol = 4e-6 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, got, want)
