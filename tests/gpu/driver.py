# SPDX-License-Identifier: Apache-2.0
"""Calls of the CUDA driver in the context that XLA works in."""

import contextlib
import ctypes
from collections.abc import Iterator


class Driver:
    """``driver.cuMemFree_v2(...)``: an error raises."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def __getattr__(self, name: str):
        function = getattr(self._library, name)

        def checked(*args) -> None:
            error = function(*args)
            assert error == 0, f"{name}: CUresult {error}"

        return checked

    @contextlib.contextmanager
    def primary_context(self, device: int) -> Iterator[None]:
        """Current for this thread, for a while."""
        context = ctypes.c_void_p()
        self.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        self.cuCtxPushCurrent_v2(context)
        try:
            yield
        finally:
            self.cuCtxPopCurrent_v2(ctypes.byref(context))
            self.cuDevicePrimaryCtxRelease_v2(device)


def free_bytes(device: int) -> int:
    """Of a GPU, as its driver says."""
    driver = Driver()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with driver.primary_context(device):
        driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return free.value
