# SPDX-License-Identifier: Apache-2.0
"""Rows of several arrays of any kind, quantised or not, between processes: to the bit."""

import dataclasses

import numpy as np
import pytest

from property.leaves import Program, random_inputs, route
from property.test_leaves import KINDS, check
from support import random_routing


def kinds():
    """Of four ranks, and with two where these need no nodes."""
    for kind in KINDS:
        shape = kind.shape
        ranks = [4] if shape.ranks_per_node else [2, 4]
        for number in ranks if shape.experts % 4 == 0 else []:
            yield dataclasses.replace(kind, shape=dataclasses.replace(shape, ranks=number))


def placed():
    """On CPU devices, two in a process, and on GPUs of a process each."""
    for kind in kinds():
        ranks = kind.shape.ranks
        cpus = pytest.mark.multihost(processes=ranks // 2, devices_per_process=2)
        if ranks == 4:
            yield pytest.param(kind, marks=[pytest.mark.cpu_only, cpus])
        gpus = pytest.mark.multihost(processes=ranks, devices_per_process=1, platform="cuda")
        yield pytest.param(kind, marks=[pytest.mark.cuda_only, gpus])


@pytest.mark.parametrize("kind", list(placed()), ids=str)
def test_leaves(kind, world):
    """All operations and gradients, with rows for all, for some and for nobody."""
    program = Program(kind)
    shape, rng = kind.shape, np.random.default_rng(0)  # the same everywhere
    capacity = np.full(shape.ranks, program.num_rows, np.int32)
    overflowed = False
    with program.group:
        for none_fraction in (0.0, 0.3, 1.0):
            idx = random_routing(rng, shape.ranks * shape.tokens, shape.top_k, shape.experts)
            idx[rng.random(idx.shape) < none_fraction] = -1
            idx = idx.reshape(shape.ranks, shape.tokens, shape.top_k)
            inputs = random_inputs(rng, kind, program.num_rows, idx, capacity)
            actual, routing = program(inputs), route(kind, inputs)
            check(kind, inputs, actual, routing)
            overflowed |= shape.overflow == "error" and bool(routing.num_dropped.any())
        if not overflowed:  # else those ranks that lost something have an error to report
            program.group.check()
        world.barrier()
