# SPDX-License-Identifier: Apache-2.0
"""When the programs that were launched on some devices have ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_LOOK_EVERY_S = 0.01


class Fence:
    """A small computation over devices of this process, which runs behind what was launched there.

    JAX launches asynchronously, and nothing else says whether a program has begun. A device runs
    what was launched on it in order; on CPUs, what spans several devices of a process runs one
    after the other, and what is on a single one in the order of the thread that launched it.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self._ordered_by_thread = len(devices) == 1 and devices[0].platform == "cpu"
        self._waiting: list[threading.Thread] = []
        mesh = Mesh(np.array(devices), ("devices",))
        sharding = NamedSharding(mesh, PartitionSpec("devices"))
        # Compiled and loaded now: on a GPU whose programs wait, loading would wait as well. And
        # whatever the caller is in the middle of, another mesh or a trace.
        with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            self._input = jax.device_put(np.zeros(len(devices), np.int32), sharding)
            self._compute = jax.jit(lambda array: array + 1).lower(self._input).compile()
        jax.block_until_ready(self._compute(self._input))

    def wait(self, timeout_s: float, given_up: Callable[[], bool]) -> bool:
        """Whether all that was launched up to now ends within ``timeout_s``, before ``given_up``.

        What was not waited for to the end can be by `join`.
        """
        # A launch blocks as long as no thread of XLA is free. So it is another thread's, except
        # where the thread makes the order; there the calling one runs the program anyway.
        result = self._compute(self._input) if self._ordered_by_thread else None
        ended = threading.Event()

        def wait_for_end() -> None:
            try:
                jax.block_until_ready(self._compute(self._input) if result is None else result)
            except jax.errors.JaxRuntimeError:
                pass  # of a device that has failed: nothing runs there any more
            ended.set()

        thread = threading.Thread(target=wait_for_end, name="smfree-fence", daemon=True)
        self._waiting.append(thread)
        thread.start()
        deadline = time.monotonic() + timeout_s
        while not ended.wait(_LOOK_EVERY_S):
            if time.monotonic() >= deadline or given_up():
                return False
        return True

    def join(self, timeout_s: float) -> None:
        """Waits for the threads of `wait`, which the exit of the process should not meet in XLA."""
        end = time.monotonic() + timeout_s
        for thread in self._waiting:
            thread.join(max(0.0, end - time.monotonic()))
