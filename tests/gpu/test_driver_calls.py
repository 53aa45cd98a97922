# SPDX-License-Identifier: Apache-2.0
"""What other threads ask of the driver while recvs wait."""

import contextlib
import ctypes
import threading

import numpy as np
import pytest

from faults.running import CONFIG, compiled, round_trip
from gpu.driver import Driver
from support import as_many, ep_mesh, make_problem

pytestmark = pytest.mark.cuda_only


@contextlib.contextmanager
def memory_is_freed_all_the_time(devices):
    """Each free waits until all kernels of its context have ended; returns how many there were."""
    driver, stop, freed = Driver(), threading.Event(), [0] * len(devices)

    def allocate_and_free(rank, device):
        with driver.primary_context(device):
            while not stop.is_set():
                address = ctypes.c_uint64()
                driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(64 << 20))
                driver.cuMemFree_v2(address)
                freed[rank] += 1

    threads = [
        threading.Thread(target=allocate_and_free, args=(rank, device.local_hardware_id))
        for rank, device in enumerate(devices)
    ]
    for thread in threads:
        thread.start()
    try:
        yield freed
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_frees_while_recvs_wait(groups):
    """A free waits for the recv, the recv for a copy: the copy must not have to wait for the free.

    The same holds for loading a module, which every new program does.
    """
    mesh = ep_mesh(as_many(4, at_least=2))
    sizes = CONFIG | {"hidden": 4096, "max_tokens": 4096}
    group = groups(mesh, **sizes, timeout_s=5.0, sm_push_bytes=0)
    problem = make_problem(mesh, tokens=4096, top_k=2, hidden=4096)
    step = compiled(group, round_trip, problem)
    expected = np.asarray(step(*problem.arrays[:3]))
    with memory_is_freed_all_the_time(mesh.devices.flat) as freed:
        results = [step(*problem.arrays[:3]) for _ in range(50)]
        np.testing.assert_array_equal(results[-1], expected)
    group.check()
    assert min(freed) > 0
