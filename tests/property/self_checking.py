# SPDX-License-Identifier: Apache-2.0
"""A round trip that knows what must come out, and counts on the device what is wrong.

Rows, routing and weights are functions of a round's number, so every rank can tell what every other
one sends. All values are integers, or sixteenths, small enough for float32 to be exact.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jax_smfree as smfree


@dataclasses.dataclass(frozen=True)
class Sent:
    """What ranks send in one round; with leading axes of ranks and positions."""

    x: jax.Array  # [..., H]
    topk_idx: jax.Array  # [..., 2]
    topk_weights: jax.Array  # [..., 2]


@dataclasses.dataclass(frozen=True)
class SelfChecking:
    """The sizes of the exchange; ``top_k`` is 2, and worst case N the number of all copies."""

    ranks: int
    tokens: int
    hidden: int
    lanes: int

    @property
    def experts(self) -> int:
        return 2 * self.ranks

    def config(self, **more: Any) -> smfree.EpConfig:
        return smfree.EpConfig(
            num_experts=self.experts,
            top_k=2,
            hidden=self.hidden,
            max_tokens=self.tokens,
            num_lanes=self.lanes,
            dtype=jnp.float32,
            **more,
        )

    def sent(self, number: Any, rank: Any, position: Any) -> Sent:
        """What stands at a position of a rank; the three broadcast."""
        mixed = jnp.uint32(0)
        for word in (number, rank, position):
            mixed = (mixed ^ jnp.asarray(word).astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
            mixed = mixed ^ (mixed >> 15)
        mixed = mixed[..., None]
        first = mixed % self.experts
        second = (first + 1 + (mixed >> 8) % (self.experts - 1)) % self.experts
        idx = jnp.concatenate([first, second], -1).astype(jnp.int32)
        shifts = jnp.array([3, 11], jnp.uint32)
        idx = jnp.where((mixed >> shifts) % 5 == 0, -1, idx)
        weights = ((mixed >> shifts) % 16).astype(jnp.float32) / 16
        x = (mixed + jnp.arange(self.hidden, dtype=jnp.uint32) * 40503) % 8192
        return Sent(x.astype(jnp.float32), idx, weights)

    def wrong_results(
        self, token: smfree.Token, number: Any
    ) -> tuple[smfree.Token, smfree.DispatchResult, jax.Array]:
        """Dispatch, experts and combine; and how many values of the result are wrong."""
        rank = jax.lax.axis_index("ep")
        mine = self.sent(number, rank, jnp.arange(self.tokens))
        d, token = smfree.dispatch(token, mine.x, mine.topk_idx, mine.topk_weights)
        second = jnp.arange(len(d.x))[:, None] >= d.group_sizes[0]
        out, token = smfree.combine(token, d, d.x * (1 + 2 * rank + second))
        scale = jnp.where(mine.topk_idx < 0, 0, mine.topk_weights * (1 + mine.topk_idx))
        expected = mine.x * jnp.sum(scale, axis=1, keepdims=True)
        return token, d, jnp.sum(out != expected)

    def wrong_rows(self, d: smfree.DispatchResult, number: Any) -> jax.Array:
        """How many values of a dispatch are not what all ranks sent here, in its order."""
        everywhere = jnp.arange(self.ranks)[:, None], jnp.arange(self.tokens)
        everybody = self.sent(number, *everywhere)
        local = everybody.topk_idx.reshape(-1) - 2 * jax.lax.axis_index("ep")
        local = jnp.where((local >= 0) & (local < 2), local, 2)
        order = jnp.argsort(local, stable=True)
        here = (local[order] < 2)[:, None]
        x = jnp.where(here, everybody.x.reshape(-1, self.hidden)[order // 2], 0)
        weights = jnp.where(here[:, 0], everybody.topk_weights.reshape(-1)[order], 0)
        sizes = jnp.array([jnp.sum(local == 0), jnp.sum(local == 1)])
        pairs = ((d.x, x), (d.weights, weights), (d.group_sizes, sizes))
        return sum(jnp.sum(actual != expected) for actual, expected in pairs)
