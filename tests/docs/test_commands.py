# SPDX-License-Identifier: Apache-2.0
"""Every command that README, CONTRIBUTING and docs/ name is run: here, by another test, or by CI.

A command is a line of a ``bash`` or ``sh`` block, what follows ``$`` in a ``console`` block, and
code in a sentence that begins with one of `PROGRAMS` and has arguments. A new one fails
`test_every_command_is_run` until it stands in one of the tables below.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.cpu_only

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PROGRAMS = (
    "cmake ctest compute-sanitizer export ibstat jax-smfree mpirun mypy ncu nsys nvidia-smi pip "
    "git pre-commit pytest python python3 ruff sphinx-build srun"
).split()

# Run here, as they stand, in a folder with the files of docs/examples.
HERE = [
    "jax-smfree doctor",
    "jax-smfree overlap report docs/examples/forward.hlo",
    "jax-smfree overlap timeline trace.json --plot timeline.png --perfetto perfetto.json",
    "jax-smfree plan",
    "jax-smfree plan --plot plan.png",
    "python -m benchmarks.gpu --help",
]

# Run here in the clone, by a shell.
IN_THE_CLONE = ("git ls-files ",)

# Run by the test that is named.
BY_TEST = {
    "jax-smfree bench --plot bench.png": "cli/test_bench.py::test_table_json_and_picture",
    "jax-smfree overlap report": "cli/test_overlap.py::test_report",
    "jax-smfree overlap report forward.hlo --steps": "cli/test_docs.py::test_output",
    "jax-smfree overlap report untied.hlo": "cli/test_docs.py::test_output",
    "jax-smfree overlap timeline": "cli/test_overlap.py::test_timeline_files",
    "jax-smfree plan --shape 8192x7168:8of256 --ranks-per-node 8 --plot plan.png": (
        "cli/test_docs.py::test_output"
    ),
    "pip wheel . --no-deps": "packaging/test_installed.py::test_files",
    "python -m benchmarks.cpu": "cli/test_benchmarks.py::test_cpu",
    "python -m benchmarks.cpu --rows 1 8 32 --budget 1": "cli/test_benchmarks.py::test_cpu",
    "python -m benchmarks.cpu --load benchmarks/results/cpu-amd-epyc-2.json": (
        "cli/test_benchmarks.py::test_tables_are_made_of_results"
    ),
    "python -m benchmarks.gpu operations --load benchmarks/results/gpu-nvidia-h200-x2.json": (
        "cli/test_benchmarks.py::test_tables_are_made_of_results"
    ),
    "python -m jax_smfree": "cli/test_main.py::test_the_package_is_a_program",
    "python docs/make_examples.py": "cli/test_docs.py::test_output",
    "python examples/life_of_a_token.py": "examples/test_life_of_a_token.py::test_it_draws",
    "python examples/train_moe_lm.py": "examples/test_train_moe_lm.py::test_a_few_steps",
    "python layer.py": "docs/test_readme.py::test_the_program_prints_what_is_shown",
    "python -m jax_smfree.testing.launch --processes 2 --devices-per-process 2 "
    "-- -m pytest tests": "testing/test_testing_external.py::test_under_our_launcher",
    "python -m jax_smfree.testing.launch --processes 2 --devices-per-process 2 "
    "-- train.py --steps 10": "testing/test_testing_launch.py::test_command_line",
}

# Run by .ci/run, in which the text stands.
BY_CI = {
    ".ci/run": "set -euo pipefail",
    "cmake --workflow --preset asan": ".venv/bin/cmake --workflow --preset asan",
    "cmake --workflow --preset tsan": ".venv/bin/cmake --workflow --preset tsan",
    "mypy": ".venv/bin/mypy",
    "pip install '.[test,schedule]'": "command_under '### Run the tests'",
    "pip install -e '.[dev,schedule]'": "sed -n '/^```bash$/{n;p;q}' CONTRIBUTING.md",
    "pre-commit install": "sed -n '/^```bash$/{n;p;q}' CONTRIBUTING.md",
    "pytest": "command_under '### Run the tests'",
    "python3 -m venv .venv": "command_under '### Run the tests'",
    "ruff check .": ".venv/bin/ruff check .",
    "ruff format .": ".venv/bin/ruff format --check .",
    "sphinx-build -W -b html docs build/docs": (
        ".venv/bin/sphinx-build -q -W -b html docs build/docs"
    ),
}

# Need what CI does not have.
ELSEWHERE = {
    "compute-sanitizer --report-api-errors no python tests/gpu/sanitize.py": "a GPU",
    "mpirun -n 16 --map-by ppr:8:node --hostfile hosts python train.py": "two hosts",
    "mpirun -n 16 --map-by ppr:8:node --hostfile hosts jax-smfree doctor --network": "two hosts",
    "mpirun -n 2 pytest tests": "Open MPI",
    "nvidia-smi topo -p2p r": "a GPU",
    "python -m benchmarks.gpu decode": "GPUs",
    "python -m benchmarks.gpu deepep --source PATH": "GPUs, PyTorch and DeepEP",
    "python -m benchmarks.gpu kernels": "a GPU",
    "python -m benchmarks.gpu layer": "GPUs",
    "python -m benchmarks.gpu matmul": "a GPU",
    "python -m benchmarks.gpu nodes": "GPUs",
    "python -m benchmarks.gpu operations": "GPUs",
    "python -m benchmarks.gpu processes": "GPUs",
    "python -m benchmarks.gpu quick --before PATH": "GPUs",
    "python -m jax_smfree.testing.launch --platform cuda --processes 8 -- train.py": "8 GPUs",
    "srun --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --kill-on-bad-exit --output=%t.log "
    "pytest tests/multiprocess --backend cuda": "two hosts with GPUs",
    "srun --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --kill-on-bad-exit --output=%t.log "
    "pytest tests/multiprocess --backend cuda": "two hosts with GPUs",
    "srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --gpu-bind=none --kill-on-bad-exit "
    "python train.py": "two hosts with GPUs",
    "srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --gpu-bind=none jax-smfree doctor "
    "--network": "two hosts with GPUs",
    "srun --ntasks=2 --gpus-per-task=1 --kill-on-bad-exit --output=%t.log pytest tests": "SLURM",
}


def whole_lines(block: str) -> Iterator[str]:
    """The lines of a block, without comments; those that a shell reads on for are one."""
    line = ""
    for part in block.splitlines():
        line += re.sub(r"\s+#.*", "", part) + "\n"
        if line.count("'") % 2 == 0 and not line.rstrip().endswith(("|", "\\")):
            yield line.strip()
            line = ""


def commands_of(page: str) -> set[str]:
    """The commands of a page, one by one, without the folder of the environment and ``--quiet``."""
    blocks = re.findall(r"^ *```(?:bash|sh)\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in whole_lines(block)]
    lines += re.findall(r"^\$ (.*)$", page, re.MULTILINE)
    prose = re.sub(r"^ *```.*?^ *```", "", page, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        words = code.replace(".venv/bin/", "").split()
        if words[0] in PROGRAMS and len(words) > 1:
            lines.append(" ".join(words))
    found = set()
    for line in lines:
        for command in line.split(" && "):
            command = command.replace(".venv/bin/", "").replace(" --quiet", "").strip()
            found.add(re.sub(r"^([A-Z_]+=\S+ )+", "", command))
    return found - {""}


COMMANDS = sorted(set().union(*(commands_of(page.read_text()) for page in PAGES)))
PYTEST = [command for command in COMMANDS if command.startswith("pytest ")]
SHELL = [command for command in COMMANDS if command.startswith(IN_THE_CLONE)]
INSTALLS = [command for command in COMMANDS if command.startswith("pip install ")]
BENCHMARKS = [c.split()[3] for c in ELSEWHERE if c.startswith("python -m benchmarks.gpu")]


def run(*arguments: str, cwd: pathlib.Path = ROOT) -> str:
    """As a user runs it, with the programs of this environment."""
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    if arguments[0] == "python":
        arguments = (sys.executable, *arguments[1:])
        environment["PYTHONPATH"] = str(ROOT)  # has the benchmarks
    elif arguments[0] == "jax-smfree":
        arguments = (sys.executable, "-m", "jax_smfree", *arguments[1:])
    done = subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_is_run():
    """By a rule (pytest, pip install), or because a table says by what. The tables have no more."""
    tables = {*HERE, *BY_TEST, *BY_CI, *ELSEWHERE}
    ruled = {*PYTEST, *INSTALLS, *SHELL}
    untold = [c for c in COMMANDS if c not in tables and c not in ruled]
    assert not untold, "say in tests/docs/test_commands.py what runs these"
    assert tables - {"cmake --workflow --preset asan"} <= set(COMMANDS), "no page has these"


@pytest.mark.parametrize("command", HERE)
def test_it_runs(command, tmp_path):
    examples = ROOT / "docs/examples"
    for file in (*examples.glob("*.hlo"), *examples.glob("*.json")):
        for folder in (tmp_path, tmp_path / "docs/examples"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
    assert run(*shlex.split(command), cwd=tmp_path) or "timeline" in command
    for name in re.findall(r"\S+\.(?:png|json)", command):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("command", SHELL)
def test_it_runs_in_the_clone(command):
    assert run("bash", "-c", command)


@pytest.mark.parametrize("test", sorted(set(BY_TEST.values())))
def test_the_test_is_there(test):
    file, name = test.split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("text", sorted(set(BY_CI.values())))
def test_the_line_is_there(text):
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert any(text in line for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("command", PYTEST)
def test_pytest_has_these_paths(command):
    """``.ci/run`` runs all of tests/, on the CPU."""
    words = [word for word in command.split()[1:] if not word.startswith("-") and word != "cuda"]
    assert all(word == "…" or (ROOT / word).exists() for word in words)


def test_the_option_of_the_gpu_tests():
    text = run("pytest", "--backend", "cuda", "-rs", "--co", "-q", "tests/gpu")
    assert "tests/gpu/test_late_ranks.py::" in text


@pytest.mark.parametrize("command", INSTALLS)
def test_what_is_installed_is_there(command):
    """The extras, and the variables of CMake."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"(?:\.|jax_smfree)\[([\w,-]+)\]", command)
    assert {e for names in extras for e in names.split(",")} <= set(
        project["optional-dependencies"]
    )
    variables = re.findall(r"cmake\.define\.(\w+)=", command)
    assert all(name in (ROOT / "CMakeLists.txt").read_text() for name in variables)


@pytest.mark.parametrize("command", BENCHMARKS)
def test_the_benchmark_is_there(command):
    assert "usage: python -m benchmarks.gpu" in run("python", "-m", "benchmarks.gpu", command, "-h")
