# SPDX-License-Identifier: Apache-2.0
"""Operations in CUDA graphs, which XLA records and replays: a training is the same to the bit."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree.testing import launch
from support import as_many, block, ep_mesh, make_problem

pytestmark = pytest.mark.cuda_only

STEPS = 1000
OFF = "--xla_gpu_enable_command_buffer="
FLAGS = {
    "default": "",
    "every operation": "--xla_gpu_graph_min_graph_size=1",
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
}


def train(result):
    """For another process: writes the losses of a model that learns to imitate another one.

    It has two MoE blocks. In the second one copy engines carry even the smallest rows.
    """
    mesh = ep_mesh(as_many(4))
    problem = make_problem(mesh, tokens=32, hidden=64)
    x, kernel = problem.x, problem.kernel
    sizes = {"num_experts": 8, "top_k": 2, "hidden": 64, "max_tokens": 32, "dtype": jnp.float32}
    configs = smfree.EpConfig(**sizes), smfree.EpConfig(**sizes, sm_push_bytes=0)
    params = {"router": jnp.eye(64, 8), "kernel": kernel}
    goal = {"router": jnp.eye(64, 8)[::-1], "kernel": kernel[::-1]}

    with contextlib.ExitStack() as stack:
        groups = [
            stack.enter_context(smfree.EpGroup.create(mesh, config=config)) for config in configs
        ]

        def local(params, x):
            for group in groups:
                probabilities = jax.nn.softmax(x @ params["router"])
                topk_weights, topk_idx = jax.lax.top_k(probabilities, 2)
                x = block(smfree, group.token(), x, topk_idx, topk_weights, params["kernel"])[1]
            return x

        layer = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("ep")), out_specs=P("ep"))
        target = jax.jit(layer)(goal, x)

        @jax.jit
        def step(params):
            def loss(params):
                return jnp.mean((layer(params, x) - target) ** 2)

            value, gradients = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

        losses = []
        for _ in range(STEPS):
            params, value = step(params)
            losses.append(value)
        for group in groups:
            group.check()
        np.save(result, np.array(losses))


def losses_with(flags, directory):
    env = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"}
    result = directory / "losses.npy"
    launch(
        train, args=[str(result)], processes=1, devices_per_process=as_many(4), platform="cuda",
        timeout_s=180, env=env, log_dir=directory,
    ).check()  # fmt: skip
    return np.load(result)


@pytest.fixture(scope="module")
def losses_without(tmp_path_factory):
    """What comes out when every operation is launched by itself."""
    losses = losses_with(OFF, tmp_path_factory.mktemp("off"))
    assert losses.shape == (STEPS,) and losses[-1] < losses[0] / 2
    return losses


@pytest.mark.parametrize("flags", FLAGS)
def test_training(flags, losses_without, tmp_path):
    losses = losses_with(FLAGS[flags], tmp_path)
    np.testing.assert_array_equal(losses.view(np.uint32), losses_without.view(np.uint32))
