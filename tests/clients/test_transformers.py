# SPDX-License-Identifier: Apache-2.0
"""The MoE blocks of Hugging Face transformers against the same blocks over four ranks.

The oracle is the package's own class, with random weights, in torch on the CPU. examples/hf_moe.py
converts weights and gradients.
"""

import dataclasses
import importlib
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from clients.comparing import assert_close, forward_and_backward
from jax_smfree import nn
from support import as_many, ep_mesh

torch = pytest.importorskip("torch", reason="needs torch: pip install '.[clients]'")
transformers = pytest.importorskip("transformers", reason="needs pip install '.[clients]'")

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
HIDDEN, EXPERTS, RANKS, TOKENS = 16, 8, 4, 24


@dataclasses.dataclass(frozen=True)
class Case:
    """A block of a model, by the names of its classes in transformers."""

    family: str
    block: str
    config: str
    settings: dict[str, Any]


CASES = {
    "Mixtral": Case("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", {"num_local_experts": 8}),
    "Qwen2-MoE": Case(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        {"num_experts": 8, "shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    ),
    "Qwen3-MoE": Case(
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        "Qwen3MoeConfig",
        {"num_experts": 8, "norm_topk_prob": True},
    ),
    "Qwen3-MoE, weights as they are": Case(
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        "Qwen3MoeConfig",
        {"num_experts": 8, "norm_topk_prob": False},
    ),
    "DeepSeek-V3": Case(
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
    ),
    "gpt-oss": Case(
        "gpt_oss",
        "GptOssMLP",
        "GptOssConfig",
        {"num_local_experts": 8, "swiglu_limit": 1.5},
    ),
    "Llama-4": Case(
        "llama4",
        "Llama4TextMoe",
        "Llama4TextConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 1},
    ),
    "OLMoE": Case("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", {"num_experts": 8}),
    "GLM-4.5": Case(
        "glm4_moe",
        "Glm4MoeMoE",
        "Glm4MoeConfig",
        {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
    ),
}


@pytest.fixture
def hf_moe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("hf_moe")


class Read(dict[str, Any]):
    """Remembers which of its entries somebody read."""

    def __init__(self, entries: dict[str, Any]):
        super().__init__(entries)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


def random_block(case: Case) -> tuple[Any, Any]:
    """The configuration and the block. Scores are far apart, biases change choices."""
    defaults = {"num_experts_per_tok": 2, "intermediate_size": 24, "moe_intermediate_size": 24}
    config = getattr(transformers, case.config)(
        hidden_size=HIDDEN, **(defaults | case.settings), experts_implementation="eager"
    )
    name = f"transformers.models.{case.family}.modeling_{case.family}"
    torch.manual_seed(0)
    block = getattr(importlib.import_module(name), case.block)(config)
    for weight in block.state_dict().values():
        weight.normal_(std=0.4)
    return config, block


def run_block(block: Any, x: np.ndarray, dout: np.ndarray) -> Any:
    """Output, gradient of x, and gradients by name, of buffers too, which have none."""
    rows = torch.tensor(x, requires_grad=True)
    out = block(rows[None])
    out = out[0] if isinstance(out, tuple) else out  # some return the router's decision too
    out.reshape(x.shape).backward(torch.tensor(dout))
    gradients = {name: jnp.array(p.grad.numpy()) for name, p in block.named_parameters()}
    for name, buffer in block.named_buffers():
        gradients[name] = jnp.zeros(buffer.shape)
    return out.detach().numpy().reshape(x.shape), rows.grad.numpy(), gradients


@pytest.mark.parametrize("model", CASES)
def test_block_and_its_gradients_equal_the_models_own(model: str, hf_moe: Any, groups: Any) -> None:
    config, block = random_block(CASES[model])
    random, ranks = np.random.default_rng(0), as_many(RANKS)
    x, dout = random.normal(size=(2, ranks * TOKENS, HIDDEN)).astype(np.float32)
    out, dx, gradients = run_block(block, x, dout)

    convert = hf_moe.FAMILIES[config.model_type]
    arrays = Read(hf_moe.arrays_of(block))
    params, options = convert(config, arrays)
    assert arrays.names == set(arrays), "weights that the example does not use"

    group = groups(
        ep_mesh(ranks),
        num_experts=EXPERTS,
        top_k=config.num_experts_per_tok,
        hidden=HIDDEN,
        max_tokens=TOKENS,
        dtype=jnp.float32,
    )

    results = forward_and_backward(group, params, options, x, dout)
    assert_close(results, (out, convert(config, gradients)[0], dx))


def test_load_balancing_loss_is_the_models_own_over_top_k() -> None:
    logits = np.random.default_rng(0).normal(size=(64, EXPERTS)).astype(np.float32)
    module = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    theirs = module.load_balancing_loss_func((torch.tensor(logits),), EXPERTS, top_k=2)
    routes = nn.route(jnp.array(logits), jnp.eye(EXPERTS), nn.RouterConfig(2))
    np.testing.assert_allclose(2 * nn.load_balancing_loss(routes), theirs, rtol=1e-5)
