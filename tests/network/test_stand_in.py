# SPDX-License-Identifier: Apache-2.0
"""The stand-in for GDRCopy has what NVSHMEM's network transports look for, on any machine."""

import ctypes
import re
import shutil
from pathlib import Path

import pytest

from jax_smfree._src import nvshmem

if shutil.which("c++") is None:
    pytest.skip("needs a C++ compiler `c++`", allow_module_level=True)


class Info(ctypes.Structure):
    """The beginning of gdrapi.h's ``gdr_info_t``."""

    _fields_ = (("va", ctypes.c_uint64), ("mapped_size", ctypes.c_uint64))


@pytest.fixture(scope="module")
def library(stand_in):
    return ctypes.CDLL(str(stand_in / "libgdrapi.so.2"))


def test_it_has_all_functions(library):
    transports = list(Path(nvshmem.library()).parent.glob("nvshmem_transport_ucx.so.*"))
    if not nvshmem.library() or not transports:
        pytest.skip("needs NVSHMEM: pip install nvidia-nvshmem-cu13")
    wanted = set(re.findall(rb"\0(gdr_[a-z0-9_]+)(?=\0)", transports[0].read_bytes()))
    assert b"gdr_map" in wanted
    for name in wanted - {b"gdr_map_v2", b"gdr_pin_buffer_v2"}:  # it does without these
        assert hasattr(library, name.decode()), name


def test_memory_is_mapped_to_itself(library):
    memory = ctypes.create_string_buffer(b"rows", 64)
    address = ctypes.addressof(memory)
    handle, mapping, info = ctypes.c_ulong(), ctypes.c_void_p(), (ctypes.c_char * 64)()
    pin = (None, ctypes.c_ulong(address), ctypes.c_size_t(64), ctypes.c_uint64(), ctypes.c_uint32())
    assert library.gdr_pin_buffer(*pin, ctypes.byref(handle)) == 0
    assert library.gdr_get_info(None, handle, info) == 0
    found = Info.from_buffer(info)
    assert (found.va, found.mapped_size) == (address, 64)
    assert library.gdr_map(None, handle, ctypes.byref(mapping), ctypes.c_size_t(64)) == 0
    assert mapping.value == address
