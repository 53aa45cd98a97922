# SPDX-License-Identifier: Apache-2.0
"""Registration of the FFI targets, one per phase, and the call sites that faults are named by."""

import functools
import os
import sys
import sysconfig
import zlib

import jax

from jax_smfree import _native
from jax_smfree._src import compat

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_SKIPPED = (_PACKAGE, os.path.dirname(os.path.abspath(jax.__file__)) + os.sep)
_STDLIB = (sysconfig.get_path("stdlib") + os.sep, sysconfig.get_path("platstdlib") + os.sep)
_SITE = (sysconfig.get_path("purelib") + os.sep, sysconfig.get_path("platlib") + os.sep)

_call_sites: dict[int, str] = {}

TARGETS: tuple[str, ...] = tuple(_native.cpu_targets())
"""Names of the custom calls that a compiled program contains."""

DISABLE_JAX_EXPORT_CHECKS: list[jax.export.DisabledSafetyCheck] = [
    jax.export.DisabledSafetyCheck.custom_call(name) for name in TARGETS
]
"""For ``jax.export.export(f, disabled_checks=smfree.DISABLE_JAX_EXPORT_CHECKS)``."""


@functools.cache
def register(platform: str) -> None:
    """Registers the targets for ``"cpu"`` or ``"CUDA"``.

    Called when a group is created, not on import: before a backend is up, jaxlib registers queued
    handlers ahead of the types that they use, and refuses them.

    A build without CUDA registers the CPU's for CUDA: a program can then be compiled for a GPU, to
    look at its schedule, and not run; `EpGroup` sees to that.
    """
    if platform == "CUDA" and _native.has_cuda:
        handlers, types = _native.cuda_targets(), {}
        compat.on_compilation(_native.cuda_compilation_begins, _native.cuda_compilation_ends)
    else:
        handlers, types = _native.cpu_targets(), _native.cpu_types()
        _follow_compilations()
    for name, (type_id, type_info) in types.items():
        jax.ffi.register_ffi_type(
            name, {"type_id": type_id, "type_info": type_info}, platform=platform
        )
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


@functools.cache
def _follow_compilations() -> None:
    compat.on_compilation(_native.compilation_begins, _native.compilation_ends)


def call_site() -> str:
    """The user's line that is being traced, e.g. ``model.py:31 in moe``.

    The base name, not the path: all ranks, and a later process that reads the compilation cache,
    must agree on it.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        library = path.startswith(_SKIPPED) or (
            path.startswith(_STDLIB) and not path.startswith(_SITE)
        )
        if not library:
            break
        frame = frame.f_back
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"


def call_site_number(site: str) -> int:
    """What stands for ``site`` in programs and messages: the same in all processes."""
    return zlib.crc32(site.encode())


def call_site_id(site: str) -> int:
    """`call_site_number`, and ``site`` is known by it from now on."""
    number = call_site_number(site)
    _native.register_call_site(number, site)
    _call_sites[number] = site
    return number


def call_site_name(number: int) -> str:
    """The line that ``number`` stands for; the number itself if another process traced it."""
    return _call_sites.get(number, f"call site {number:#010x}")
