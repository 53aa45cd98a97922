# SPDX-License-Identifier: Apache-2.0
"""What a wheel puts on a machine; skipped where the package runs from its sources."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import jax_smfree

pytestmark = pytest.mark.cpu_only

# Of the system, with the CUDA backend too: its runtime is inside, and finds the driver by itself.
SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2"}
SYSTEM |= {"ld-linux-aarch64.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1"}


@pytest.fixture(scope="module")
def installed():
    """The files of the wheel, by name."""
    try:
        files = metadata.files("jax_smfree") or []
    except metadata.PackageNotFoundError:
        files = []
    found = {str(file): Path(file.locate()) for file in files}
    here = Path(jax_smfree.__file__)
    if here not in found.values():
        pytest.skip("the package runs from its sources")
    return found


def test_files(installed):
    assert any(name.endswith("licenses/LICENSE") for name in installed)
    assert "jax_smfree/py.typed" in installed
    assert "jax_smfree/_native.pyi" in installed
    sources = [name for name in installed if name.endswith((".cc", ".cu", ".h", ".cuh"))]
    assert sources == []


def test_one_build_for_all_later_pythons(installed):
    (wheel,) = (path for name, path in installed.items() if name.endswith("dist-info/WHEEL"))
    (tag,) = re.findall("^Tag: (.*)$", wheel.read_text(), re.MULTILINE)
    assert tag.startswith("cp311-cp311-" if sys.version_info < (3, 12) else "cp312-abi3-")


def test_module_needs_the_system_only(installed):
    (module,) = (path for name, path in installed.items() if re.match(r".*/_native\..*so$", name))
    dynamic = subprocess.run(
        ["readelf", "-d", module], check=True, capture_output=True, text=True
    ).stdout
    assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)) <= SYSTEM
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
