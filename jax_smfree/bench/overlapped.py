# SPDX-License-Identifier: Apache-2.0
"""A round trip around matrix products that take about as long, and these products alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

import jax_smfree as smfree
from jax_smfree.bench.cases import COMPUTE, TOGETHER, Shape
from jax_smfree.bench.programs import Sample, compiled, sharded, timed

MAX_PRODUCTS = 256


def products(count: int, a: Array, w: Array) -> Array:
    """A chain of matrix products, the compute that rows move under."""
    for _ in range(count):
        a = a @ w
    return a


def exchange_around(
    group: smfree.EpGroup,
    count: int,
    x: Array,
    topk_idx: Array,
    topk_weights: Array,
    a: Array,
    w: Array,
) -> tuple[Array, Array]:
    """A round trip with ``count`` products under the dispatch, and as many under the combine."""
    chain = functools.partial(products, count)
    token = smfree.dispatch_send(group.token(), x, topk_idx, topk_weights)
    token, a = smfree.overlap(token, chain, a, w)
    d, token = smfree.dispatch_recv(token)
    token = smfree.combine_send(token, d, d.x)
    token, a = smfree.overlap(token, chain, a, w)
    out, _ = smfree.combine_recv(token)
    return out, a


class Overlapped:
    """Half of the products run under the dispatch, half under the combine.

    Args:
      round_trip_s: what the products shall take together.
    """

    def __init__(
        self, mesh: Mesh, shape: Shape, group: smfree.EpGroup, round_trip_s: float
    ) -> None:
        self._group = group
        key, size = jax.random.key(0), (shape.ranks * shape.hidden, shape.hidden)
        # Variance 1 / hidden, so that a chain of products neither grows nor dies.
        weights = jax.random.normal(key, size) * shape.hidden**-0.5
        self._w = jax.device_put(weights.astype(shape.dtype), sharded(mesh))
        one = compiled(functools.partial(products, 1), mesh)
        sample: Sample = {}
        rows = (shape.ranks * shape.rows, shape.hidden)
        x = jnp.ones(rows, shape.dtype, device=sharded(mesh))
        for _ in range(3):
            timed(sample, COMPUTE, one, x, self._w)
        wanted = round(round_trip_s / 2 / sample[COMPUTE][0])
        self._count = min(max(1, wanted), MAX_PRODUCTS)
        self._alone = compiled(functools.partial(products, 2 * self._count), mesh)
        self._together = compiled(self._exchange, mesh)

    def _exchange(
        self, x: Array, topk_idx: Array, topk_weights: Array, w: Array
    ) -> tuple[Array, Array]:
        return exchange_around(self._group, self._count, x, topk_idx, topk_weights, x, w)

    def measure(self, sample: Sample, *inputs: Array) -> None:
        timed(sample, COMPUTE, self._alone, inputs[0], self._w)
        timed(sample, TOGETHER, self._together, *inputs, self._w)
