# SPDX-License-Identifier: Apache-2.0
"""Hypothesis draws routings and values for the static shape of a compiled program."""

import os

import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from property.round_trip import Inputs, Shape
from support import random_routing

# SMFREE_EXAMPLES=1000 for a soak, which draws other examples each time.
EXAMPLES = int(os.environ.get("SMFREE_EXAMPLES", "0"))

KINDS = ("free", "uniform", "skewed", "one expert", "one rank", "silent ranks", "nothing")


def examples(number: int) -> settings:
    """How many examples a test takes; the same ones each time, unless it is a soak."""
    return settings(
        max_examples=EXAMPLES or number,
        derandomize=not EXAMPLES,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def routings(draw: st.DrawFn, shape: Shape) -> np.ndarray:
    """topk_idx [R, T, K]: -1 anywhere, no expert twice in a row."""
    kind = draw(st.sampled_from(KINDS))
    rows, top_k, experts = shape.ranks * shape.tokens, shape.top_k, shape.experts
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    idx = random_routing(rng, rows, top_k, experts)
    if kind == "free" and rows * experts < 1000:  # more are too many draws for hypothesis
        row = st.permutations(range(-top_k, experts)).map(lambda p: p[:top_k])
        idx = np.array(draw(st.lists(row, min_size=rows, max_size=rows)), np.int32)
        idx[idx < 0] = -1
    elif kind == "skewed":
        # Gumbel's trick: top-k of perturbed log probabilities, here of a power law.
        popularity = rng.permutation(-2.0 * np.log1p(np.arange(experts)))
        idx = np.argsort(popularity + rng.gumbel(size=(rows, experts)), axis=1)[:, -top_k:]
    elif kind == "one expert":
        idx[:] = -1
        slot = draw(st.integers(0, top_k - 1))
        idx[:, slot] = draw(st.integers(0, experts - 1))
    elif kind == "one rank":
        local = experts // shape.ranks
        first = local * draw(st.integers(0, shape.ranks - 1))
        idx[(idx < first) | (idx >= first + local)] = -1
    elif kind == "silent ranks":
        silent = draw(st.sets(st.integers(0, shape.ranks - 1), min_size=1))
        idx.reshape(shape.ranks, -1)[sorted(silent)] = -1
    elif kind == "nothing":
        idx[:] = -1
    if kind not in ("free", "one expert"):
        idx[rng.random(idx.shape) < draw(st.sampled_from([0.0, 0.1, 0.8]))] = -1
    return idx.reshape(shape.ranks, shape.tokens, top_k).astype(np.int32)


@st.composite
def inputs(draw: st.DrawFn, shape: Shape, num_rows: int) -> Inputs:
    """All operands and cotangents; ``num_rows`` is N."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_inputs(rng, shape, num_rows, draw(routings(shape)))


def random_inputs(
    rng: np.random.Generator, shape: Shape, num_rows: int, topk_idx: np.ndarray
) -> Inputs:
    """Values for a routing."""
    dtype = jnp.dtype(shape.dtype)
    sent = (shape.ranks, shape.tokens, shape.hidden)
    received = (shape.ranks, num_rows, shape.hidden)

    def floats(size: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Numbers of very different sizes, and zeros of both signs."""
        scale = 2.0 ** rng.integers(-6, 7, size)
        values = rng.standard_normal(size) * scale
        values[rng.random(size) < 0.05] = 0.0
        values[rng.random(size) < 0.05] = -0.0
        return values.astype(dtype)

    def any_bits(size: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Every number there is, with infinities, subnormal numbers and NaNs of all kinds."""
        return rng.integers(0, 256, (*size[:-1], size[-1] * dtype.itemsize), np.uint8).view(dtype)

    return Inputs(
        topk_idx=topk_idx,
        x=any_bits(sent, dtype),
        topk_weights=floats((*sent[:2], shape.top_k), np.dtype(np.float32)),
        ys=tuple(floats(received, dtype) for _ in range(3)),
        weights=floats(received[:2], np.dtype(np.float32)),
        received_ct=floats(received, dtype),
        received_weights_ct=floats(received[:2], np.dtype(np.float32)),
        out_cts=tuple(floats(sent, dtype) for _ in range(3)),
    )
