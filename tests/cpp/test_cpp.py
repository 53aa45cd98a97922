# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ tests and runs them.

``.venv/bin/cmake --workflow --preset tsan`` and ``asan`` run them under sanitizers.
"""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "pytest-cpp"  # kept, so that the next run compiles what has changed only
PRESET = "release"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs one of the tools that this Python's environment has, or else the system's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(command[0], path=path)
    assert program, f"{command[0]} was not found. Install the extra: pip install '.[test]'"
    return subprocess.run(
        [program, *command[1:]],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check(*command: str) -> None:
    result = run(*command)
    assert result.returncode == 0, f"{' '.join(command)}:\n{result.stdout[-8000:]}"


@pytest.fixture(scope="session")
def build() -> Path:
    jobs = str(len(os.sched_getaffinity(0)))
    check("cmake", "--preset", PRESET, "-B", str(BUILD))
    check("cmake", "--build", str(BUILD), "--parallel", jobs)
    return BUILD


def test_all_pass(build, tmp_path):
    """None fails, and none is skipped, disabled or not built."""
    report = tmp_path / "report.xml"
    result = run(
        "ctest", "--test-dir", str(build), "--output-on-failure", "--no-tests=error",
        "--timeout", "300", "--output-junit", str(report),
    )  # fmt: skip
    assert report.exists(), result.stdout
    cases = list(ET.parse(report).getroot().iter("testcase"))
    ran = {case.get("name") for case in cases if case.get("status") == "run"}
    assert result.returncode == 0, result.stdout[-8000:]
    assert ran == {case.get("name") for case in cases} == expected_names()


def expected_names() -> set[str]:
    """The tests that tests/cpp has sources for."""
    sources = Path(__file__).parent.glob("*.cc")
    return {source.stem for source in sources}
