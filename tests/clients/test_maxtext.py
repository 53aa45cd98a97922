# SPDX-License-Identifier: Apache-2.0
"""MaxText's RoutedMoE on its dense path against the same block over four ranks.

CI does not run it: MaxText names none of the many packages that it imports, and needs a Python of
3.12 or newer. docs/adopt.md says how to install it.
"""

import importlib
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from clients.comparing import assert_close, forward_and_backward
from support import as_many, devices, ep_mesh

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
HIDDEN, WIDTH, EXPERTS, RANKS, TOKENS = 16, 24, 8, 4, 24

CASES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {},
    "qwen3-30b-a3b": {},
    "deepseek3-671b": {"n_routing_groups": 4, "topk_routing_group": 2},
    "gpt-oss-20b": {"mlp_activations_limit": 1.5},
}


@pytest.fixture(scope="module")
def maxtext() -> Any:
    """The package. It and what it imports warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "needs MaxText and what it imports, see docs/adopt.md"
        package = pytest.importorskip("maxtext", reason=reason)
        pytest.importorskip("maxtext.layers.moe", reason=reason, exc_type=ImportError)
        importlib.import_module("maxtext.configs.pyconfig")
        yield package


def random_block(maxtext: Any, model: str) -> Any:
    """The configuration, and the block with random parameters and biases."""
    from flax import nnx

    config = maxtext.configs.pyconfig.initialize(
        ["", str(pathlib.Path(maxtext.__file__).parent / "configs/base.yml")],
        model_name=model,
        override_model_config=True,
        base_emb_dim=HIDDEN,
        base_mlp_dim=WIDTH,
        base_moe_mlp_dim=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        sparse_matmul=False,
        megablox=False,
        dtype="float32",
        weight_dtype="float32",
        matmul_precision="highest",
        float32_gate_logits=True,
        enable_checkpointing=False,
        log_config=False,
        run_name="test",
        jax_cache_dir="",  # by default a folder at home, of the whole process
        **CASES[model],
    )
    axes = config.mesh_axes
    block = maxtext.layers.moe.RoutedMoE(
        config=config,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        mesh=Mesh(devices(1).reshape((1,) * len(axes)), axes),
        kernel_init=maxtext.layers.initializers.nd_dense_init(1.0, "fan_in", "normal"),
        kernel_axes=("embed", None),
        rngs=nnx.Rngs(0),
        intermediate_dim=WIDTH,
    )
    random = np.random.default_rng(1)
    state = nnx.state(block, nnx.Not(nnx.RngState))
    values = jax.tree.map(lambda a: jnp.float32(0.4 * random.normal(size=a.shape)), state)
    nnx.update(block, values)
    return config, block


@pytest.mark.parametrize("model", CASES)
def test_block_and_its_gradients_equal_maxtexts(
    model: str, maxtext: Any, groups: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    from flax import nnx

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)  # MaxText makes a folder for its output
    routed_moe = importlib.import_module("maxtext_moe").routed_moe
    config, block = random_block(maxtext, model)
    random, ranks = np.random.default_rng(0), as_many(RANKS)
    x, dout = random.normal(size=(2, ranks * TOKENS, HIDDEN)).astype(np.float32)
    graph, state, rest = nnx.split(block, nnx.Not(nnx.RngState), ...)
    arrays = nnx.to_pure_dict(state)

    @jax.jit
    def theirs(arrays: Any, x: jax.Array, dout: jax.Array) -> Any:
        def apply(arrays: Any, x: jax.Array) -> jax.Array:
            block = nnx.merge(graph, state, rest, copy=True)
            nnx.update(block, arrays)
            return block(x[None])[0][0]

        out, pullback = jax.vjp(apply, arrays, x)
        return out, pullback(dout)

    want_out, (gradients, want_dx) = theirs(arrays, x, dout)

    params, options = routed_moe(config, arrays)
    group = groups(
        ep_mesh(ranks),
        num_experts=EXPERTS,
        top_k=2,
        hidden=HIDDEN,
        max_tokens=TOKENS,
        dtype=jnp.float32,
    )
    results = forward_and_backward(group, params, options, x, dout)
    assert_close(results, (want_out, routed_moe(config, gradients)[0], want_dx))
