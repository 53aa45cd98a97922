# SPDX-License-Identifier: Apache-2.0
"""When the programs that were launched on some devices have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_LONGEST_NAP_S = 0.01


class Fence:
    """A small computation over devices of this process, which runs behind what was launched there.

    JAX launches asynchronously, and nothing else says whether a program has begun. A device runs
    what was launched on it in order; on CPUs, what spans several devices of a process runs one
    after the other, and what is on a single one in the order of the thread that launched it.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        mesh = Mesh(np.array(devices), ("devices",))
        sharding = NamedSharding(mesh, PartitionSpec("devices"))
        # Compiled and loaded now: on a GPU whose programs wait, loading would wait as well. And
        # whatever the caller is in the middle of, another mesh or a trace.
        with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            self._input = jax.device_put(np.zeros(len(devices), np.int32), sharding)
            self._compute = jax.jit(lambda array: array + 1).lower(self._input).compile()
        jax.block_until_ready(self._compute(self._input))

    def wait(self, timeout_s: float, given_up: Callable[[], bool]) -> bool:
        """Whether all that was launched up to now ends within ``timeout_s``; or ``given_up``."""
        deadline = time.monotonic() + timeout_s
        try:
            behind = self._compute(self._input)
            nap_s = 1e-4
            while not behind.is_ready():
                if time.monotonic() >= deadline or given_up():
                    return False
                time.sleep(nap_s)
                nap_s = min(2 * nap_s, _LONGEST_NAP_S)
        except jax.errors.JaxRuntimeError:
            pass  # of a device that has failed: nothing runs there any more
        return True
