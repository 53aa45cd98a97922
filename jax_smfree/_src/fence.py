# SPDX-License-Identifier: Apache-2.0
"""When the programs that were launched on some devices have ended."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_LOOK_EVERY_S = 0.01


class _Asked(NamedTuple):
    result: jax.Array | None  # None: still to be computed
    ended: threading.Event


class Fence:
    """A small computation over devices of this process, which runs behind what was launched there.

    JAX launches asynchronously, and nothing else says whether a program has begun. A device runs
    what was launched on it in order; on CPUs, what spans several devices of a process runs one
    after the other, and what is on a single one in the order of the thread that launched it.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self._ordered_by_thread = len(devices) == 1 and devices[0].platform == "cpu"
        mesh = Mesh(np.array(devices), ("devices",))
        sharding = NamedSharding(mesh, PartitionSpec("devices"))
        # Compiled and loaded now: on a GPU whose programs wait, loading would wait as well. And
        # whatever the caller is in the middle of, another mesh or a trace.
        with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            self._input = jax.device_put(np.zeros(len(devices), np.int32), sharding)
            self._compute = jax.jit(lambda array: array + 1).lower(self._input).compile()
        jax.block_until_ready(self._compute(self._input))
        # From the start, because from Python 3.12 on a process that is ending starts no thread.
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._answer, name="smfree-fence", daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while (asked := self._asked.get()) is not None:
            result = asked.result
            try:
                jax.block_until_ready(self._compute(self._input) if result is None else result)
            except jax.errors.JaxRuntimeError:
                pass  # of a device that has failed: nothing runs there any more
            asked.ended.set()

    def wait(self, timeout_s: float, given_up: Callable[[], bool]) -> bool:
        """Whether all that was launched ends within ``timeout_s`` and before ``given_up``."""
        # A launch blocks as long as no thread of XLA is free. So it is another thread's, except
        # where the thread makes the order; there the calling one runs the program anyway.
        result = self._compute(self._input) if self._ordered_by_thread else None
        asked = _Asked(result, threading.Event())
        self._asked.put(asked)
        deadline = time.monotonic() + timeout_s
        while not asked.ended.wait(_LOOK_EVERY_S):
            if time.monotonic() >= deadline or given_up():
                return False
        return True

    def end(self, timeout_s: float) -> None:
        """Lets the thread go, which the exit of the process should not meet in XLA."""
        self._asked.put(None)
        self._thread.join(timeout_s)
