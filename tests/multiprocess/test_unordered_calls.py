# SPDX-License-Identifier: Apache-2.0
"""Calls that no data order, between processes: each names the calls of its own compilation."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

import jax_smfree as smfree
from jax_smfree._src import reference
from jax_smfree.testing import chaos
from support import assert_trees_close, chaos_on_cpu, ep_mesh, make_problem, reference_of
from unordered_calls import (
    checkpoint_of_the_loss,
    custom_vjp_that_recomputes,
    eight_gradients,
    eight_inputs,
    jitted_layer_called_twice,
    one_call,
    one_gradient,
    program_of,
    second_order,
    steps_in_a_loop,
    two_calls_in_a_scan,
    value_and_gradient_apart,
    vjp_called_twice,
)

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}
CPUS = [pytest.mark.cpu_only, pytest.mark.multihost(processes=2, devices_per_process=2)]
GPUS = [
    pytest.mark.cuda_only,
    pytest.mark.multihost(processes=2, devices_per_process=1, platform="cuda"),
]
MOST = [
    eight_inputs,
    eight_gradients,
    jitted_layer_called_twice,
    value_and_gradient_apart,
    custom_vjp_that_recomputes,
    vjp_called_twice,
    two_calls_in_a_scan,
    checkpoint_of_the_loss,
    second_order,
]


def compiled(program, group, problem):
    run = program_of(program, smfree, group.token, problem)
    return run.lower(*problem.arrays).compile()


def whole(run, problem):
    """What it computes, whole in every process."""
    return multihost_utils.process_allgather(run(*problem.arrays), tiled=True)


def expected_of(program, group, problem):
    return whole(program_of(program, reference, reference_of(group).token, problem), problem)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    "ranks", [pytest.param(4, marks=CPUS, id="cpus"), pytest.param(2, marks=GPUS, id="gpus")]
)
@pytest.mark.parametrize("program", MOST, ids=lambda program: program.__name__)
def test_programs(groups, world, program, ranks):
    """On GPUs XLA begins more than the default has sets for where eight calls may begin at once."""
    group = groups(ep_mesh(ranks), **CONFIG, num_sets=16 if program is eight_inputs else None)
    problem = make_problem(group.mesh)
    run = compiled(program, group, problem)
    actual = whole(run, problem)
    assert_trees_close(actual, expected_of(program, group, problem))
    for seed in range(2):
        world.barrier()
        with chaos_on_cpu(group, seed=2 * seed + world.rank, max_delay_us=300):
            assert_same(whole(run, problem), actual)
            world.barrier()  # what one process holds back, another one waits for
    world.barrier()  # a group is closed when nobody needs it any more


@pytest.mark.cpu_only
@pytest.mark.multihost(processes=2, devices_per_process=4)
@pytest.mark.parametrize("mode", ["direct", "hierarchical"])
def test_bits_of_ordered_calls(groups, world, mode):
    """Eight calls, and eight gradients, in one program and one after the other in their own."""
    group = groups(ep_mesh(8), **CONFIG, mode=mode)
    problem = make_problem(group.mesh)
    for eight, one in ((eight_inputs, one_call), (eight_gradients, one_gradient)):
        together, alone = (program_of(p, smfree, group.token, problem) for p in (eight, one))
        scaled = [
            dataclasses.replace(problem, x=factor * problem.x) for factor in map(float, range(1, 9))
        ]
        expected = [whole(alone, one_of_them) for one_of_them in scaled]
        for _ in range(5):
            assert_same(whole(together, problem), expected)
    world.barrier()


@pytest.mark.cpu_only
@pytest.mark.multihost(processes=2, devices_per_process=2)
def test_what_else_a_process_compiles(groups, world):
    """Nothing of it counts: programs that only one process compiles, before, between and beside."""
    group = groups(ep_mesh(4), **CONFIG)
    problem = make_problem(group.mesh)

    def compile_more(program):
        if world.rank == 1:
            compiled(program, group, problem)

    def fail_to_compile():
        """With calls of ours that exist when it fails."""
        unknown = jax.ffi.ffi_call("no_such_target", jax.ShapeDtypeStruct((), jnp.float32))

        def program(layer, x, kernel):
            return unknown(jnp.sum(layer(layer(x, kernel), kernel)))

        with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_target"):
            compiled(program, group, problem)

    compile_more(eight_inputs)
    first = compiled(eight_inputs, group, problem)
    if world.rank == 0:
        fail_to_compile()
    compile_more(eight_gradients)
    second = compiled(eight_gradients, group, problem)
    compile_more(jitted_layer_called_twice)

    stop = threading.Event()

    def compile_all_the_time():
        """Programs of other code, in a thread of their own."""
        count = 0
        while not stop.is_set():
            jax.jit(lambda x, count=count: jnp.sin(x) + count)(jnp.float32(0))
            count += 1

    thread = threading.Thread(target=compile_all_the_time)
    if world.rank == 1:
        thread.start()
    third = compiled(jitted_layer_called_twice, group, problem)
    fourth = compiled(eight_inputs, group, problem)
    stop.set()
    if world.rank == 1:
        thread.join()

    again, *results = (whole(run, problem) for run in (fourth, first, second, third))
    programs = (eight_inputs, eight_gradients, jitted_layer_called_twice)
    for result, program in zip(results, programs, strict=True):
        assert_trees_close(result, expected_of(program, group, problem))
    assert_same(again, results[0])
    world.barrier()


@pytest.mark.cpu_only
@pytest.mark.multihost(processes=2, devices_per_process=2)
def test_endurance(groups, world):
    """Loops, in which ranks are an iteration apart."""
    group = groups(ep_mesh(4), **CONFIG)
    problem = make_problem(group.mesh)
    run = compiled(steps_in_a_loop, group, problem)
    expected = whole(run, problem)
    for seed in range(2):
        world.barrier()
        with chaos(group, seed=2 * seed + world.rank, max_delay_us=100):
            assert_same(whole(run, problem), expected)
            world.barrier()
    world.barrier()
