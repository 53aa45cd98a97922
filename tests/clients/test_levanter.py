# SPDX-License-Identifier: Apache-2.0
"""The moe_mlp of Levanter's Grug models, on one device, against the same over four ranks.

CI does not run it: it needs a Python of 3.12 or newer and a JAX older than 0.12.
"""

import importlib
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clients.comparing import assert_close
from support import as_many, ep_mesh

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
HIDDEN, WIDTH, EXPERTS, TOP_K, RANKS, TOKENS = 16, 24, 8, 2, 4, 24


@pytest.fixture(scope="module")
def grug() -> Any:
    """The module. What it imports warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "needs marin-levanter, see docs/adopt.md"
        yield pytest.importorskip("levanter.grug.grug_moe", reason=reason, exc_type=ImportError)


@pytest.mark.parametrize("padded", [False, True], ids=["all rows", "padded"])
def test_outputs_and_gradients_equal_levanters(
    padded: bool, grug: Any, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    moe_mlp = importlib.import_module("levanter_moe").moe_mlp
    ranks = as_many(RANKS)
    rows, random = ranks * TOKENS, np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape, scale=0.5).astype(np.float32)

    x, dout = normal(rows, HIDDEN), normal(rows, HIDDEN)
    chosen = random.permuted(np.tile(np.arange(EXPERTS), (rows, 1)), axis=1)[:, :TOP_K]
    weights = np.abs(normal(rows, TOP_K))
    w_up_gate, w_down = normal(EXPERTS, HIDDEN, 2 * WIDTH), normal(EXPERTS, WIDTH, HIDDEN)
    valid = np.arange(rows) % 5 != 0 if padded else np.ones(rows, bool)

    group = groups(
        ep_mesh(ranks),
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        max_tokens=TOKENS,
        dtype=jnp.float32,
    )

    def ours(x: Any, weights: Any, w_up_gate: Any, w_down: Any) -> jax.Array:
        def on_each_rank(valid: Any, chosen: Any, x: Any, weights: Any, *w: Any) -> jax.Array:
            return moe_mlp(group.token(), x, chosen, weights, *w, token_valid=valid)[1]

        layer = jax.shard_map(
            on_each_rank, mesh=group.mesh, in_specs=(P("ep"),) * 6, out_specs=P("ep")
        )
        return layer(valid, chosen, x, weights, w_up_gate, w_down)

    def theirs(x: Any, weights: Any, w_up_gate: Any, w_down: Any) -> jax.Array:
        return grug.moe_mlp(x, chosen, weights, w_up_gate, w_down, token_valid=valid)

    def run(layer: Any) -> Any:
        out, pullback = jax.vjp(layer, x, weights, w_up_gate, w_down)
        return out, pullback(dout)

    assert_close(jax.jit(lambda: run(ours))(), jax.jit(lambda: run(theirs))())
