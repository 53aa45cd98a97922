# SPDX-License-Identifier: Apache-2.0
"""The kernel with NVSHMEM's device library, which builds without the wheel leave out, compiles."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def wheel() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if Path(folder, "nvshmem/lib/libnvshmem_device.a").exists():
            return Path(folder, "nvshmem")
    return None


def run(*command: str) -> None:
    result = subprocess.run(
        command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{' '.join(command)}:\n{result.stdout}{result.stderr}"


def test_compiles_and_links(tmp_path):
    nvshmem = wheel()
    if nvshmem is None or shutil.which("nvcc", path=PATH) is None:
        pytest.skip("needs nvcc and the wheel nvidia-nvshmem-cu12 or -cu13")
    run(
        "cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja",
        "-DSMFREE_CUDA=ON", "-DSMFREE_BUILD_PYTHON=OFF", "-DCMAKE_CUDA_ARCHITECTURES=90-real",
        f"-DNVSHMEM_ROOT={nvshmem}",
    )  # fmt: skip
    run("cmake", "--build", str(tmp_path), "--target", "csrc/put_messages.fatbin")
    module = (tmp_path / "csrc/put_messages.fatbin").read_bytes()
    assert b"smfree_put_messages" in module
