# SPDX-License-Identifier: Apache-2.0
"""Calls that no data order, however XLA schedules and launches them: right at the default config.

How many operations it has in flight together follows from its scheduler; a CUDA graph runs the
order that it was captured in. Each setting needs a process of its own.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
from jax_smfree.testing import launch
from support import as_many, ep_mesh, make_problem
from unordered_calls import (
    checkpoint_of_the_loss,
    eight_gradients,
    eight_inputs,
    linearised_called_twice,
    program_of,
    second_order,
    unrolled_accumulation,
    value_and_gradient_apart,
    vjp_called_twice,
)

pytestmark = pytest.mark.cuda_only

PROGRAMS = [
    eight_inputs,
    eight_gradients,
    value_and_gradient_apart,
    vjp_called_twice,
    linearised_called_twice,
    checkpoint_of_the_loss,
    unrolled_accumulation,
    second_order,
]
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
ALL_GRAPHS = "--xla_gpu_graph_min_graph_size=1"
EARLY = "--xla_gpu_enable_latency_hiding_scheduler=true"
FLAGS = {
    "default": "",
    "every operation": ALL_GRAPHS,
    "early": EARLY,
    "early, no graphs": f"{EARLY} {NO_GRAPHS}",
    "early, every operation": f"{EARLY} {ALL_GRAPHS}",
}


def run_programs(result):
    """For another process: runs them by turns, and writes what they return."""
    mesh = ep_mesh(as_many(4, at_least=2))
    sizes = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}
    configs = smfree.EpConfig(**sizes), smfree.EpConfig(**sizes, sm_push_bytes=0)
    problem = make_problem(mesh)
    found = {}
    for name, config in zip(("pushed", "copied"), configs, strict=True):
        with smfree.EpGroup.create(mesh, config=config) as group:
            programs = [program_of(p, smfree, group.token, problem) for p in PROGRAMS]
            for _ in range(4):  # graphs are captured in one and replayed in the next
                for program, run in zip(PROGRAMS, programs, strict=True):
                    leaves = jax.tree.leaves(run(*problem.arrays))
                    for number, leaf in enumerate(map(np.asarray, leaves)):
                        key = f"{program.__name__} {name} {number}"
                        np.testing.assert_array_equal(leaf, found.setdefault(key, leaf))
                group.check()
            stats = group.stats()
            assert stats["sends_without_set"] == 0 and stats["sets_added"] > 0, stats
    np.savez(result, **found)


def results_with(flags, directory):
    result = directory / "results.npz"
    launch(
        run_programs, args=[str(result)], processes=1,
        devices_per_process=as_many(4, at_least=2), platform="cuda", timeout_s=300,
        env={"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}, log_dir=directory,
    ).check()  # fmt: skip
    return dict(np.load(result))


@pytest.fixture(scope="module")
def results_without(tmp_path_factory):
    """What comes out when operations are launched by themselves, in the order of their memory."""
    return results_with(NO_GRAPHS, tmp_path_factory.mktemp("off"))


@pytest.mark.parametrize("flags", FLAGS)
def test_programs(flags, results_without, tmp_path):
    results = results_with(FLAGS[flags], tmp_path)
    assert results.keys() == results_without.keys()
    for name, expected in results_without.items():
        np.testing.assert_allclose(results[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
