# SPDX-License-Identifier: Apache-2.0
"""Plain CUDA programs, compiled with nvcc and run: what the hardware can do without the library.

link_ceilings.cu   copies and stores between GPUs
row_patterns.cu    rows inside a GPU, in the patterns of the phases
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from benchmarks.machine import cuda_tool
from benchmarks.results import Json


def run(name: str, *args: int) -> Json:
    """The JSON object that the program ``name`` prints."""
    with tempfile.TemporaryDirectory() as directory:
        program = str(Path(directory, name))
        source = str(Path(__file__).with_name(f"{name}.cu"))
        _checked(cuda_tool("nvcc"), "-O3", "-arch=native", "-o", program, source)
        found: Json = json.loads(_checked(program, *map(str, args)))
    return found


def _checked(*command: str) -> str:
    """What the command prints; raises what it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr.strip()}")
    return done.stdout
