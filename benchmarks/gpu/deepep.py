# SPDX-License-Identifier: Apache-2.0
"""DeepEP V1 beside this library: 8192 and 128 rows by turns on the same GPUs, in one table.

    python -m benchmarks.gpu deepep --source PATH   some minutes, and those of building DeepEP
    python -m benchmarks.gpu deepep --load R.json   the table of an earlier run
    python -m benchmarks.gpu deepep --source PATH --smoke   one round of tiny shapes

PATH is a checkout of DeepEP before its V2, whose last commit is 567632d. It is built in a copy,
unless it has been built in place by what is run there, too:

    CPLUS_INCLUDE_PATH=/usr/local/cuda/include/cccl python setup.py egg_info build_ext --inplace

That takes nvcc, the headers of libibverbs, and a Python with PyTorch, ninja, setuptools and
nvidia-nvshmem-cu13. DeepEP is measured by its own tests, this library by ``quick``; each in
processes that have ended before the other begins. Writes a JSON and a Markdown file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import machine, results
from benchmarks.gpu import quick
from benchmarks.gpu.cases import SHAPES, SMOKE_SHAPES, sizes_of
from benchmarks.gpu.deepep_figures import (
    COMPARED,
    INTRANODE,
    LOW_LATENCY,
    PRINTED,
    figures,
    times,
)
from benchmarks.report import comparison, find, machine_line, number, show, table
from benchmarks.results import Json

OURS, DEEPEP = "jax_smfree", "DeepEP V1"
ROUNDS = 2
DEADLINE_S = 180  # of one of its tests
PROBE = """
import importlib.metadata, json, deep_ep, torch
print(json.dumps({"deep_ep": importlib.metadata.version("deep_ep"), "torch": torch.__version__}))
"""
LEGEND = """\
Microseconds; the ratio is DeepEP's time over ours. Of each side the better one of its rounds, which
alternate. The two do not do quite the same:

- *Rows.* Ours: one for each expert, grouped by expert, and a combine sums them. DeepEP's
  intranode kernels deliver a row once per rank, in the order of the senders; to group them, and to
  sum over a rank's experts before a combine, is left to others. Its low-latency kernels deliver one
  for each expert, padded to the largest possible group.
- *In a dispatch.* Ours: the routing, the weights, the sizes of the groups; an fp8 one quantises.
  DeepEP's intranode test repeats a dispatch whose layout is known, without weights, and its fp8
  rows are quantised before. Its low-latency dispatch has routing and quantising in it, no weights;
  up to ten copies of a rank's rows are left out.
- *SMs.* DeepEP's intranode kernels keep 24 of them busy for as long as rows move (the best of its
  chunk sizes counts), its low-latency ones nearly all. Ours are busy in the phases; in between
  copy engines move the rows of the first shape. Few rows are stored by the kernels.
- *Times.* Ours are medians. First shape: of calls back to back, by the host's clock. Few rows:
  device time from the first block to the last one; phases where the rows have long arrived.
  DeepEP's are means: intranode by CUDA events on one rank; low latency of kernels in a profiler,
  only its dispatch and combine together by CUDA events. Of several ranks the slowest one counts.
- *Types.* DeepEP's phases of a dispatch, and its dispatch and combine together, are those of an fp8
  dispatch, ours are bf16. Combines are bf16.
- *Values.* The rows of DeepEP's intranode test are all alike, ours are random."""


def checkout(path: Path | None) -> Path:
    """``path``, if it has the tests that are run."""
    missing = [n for n in (INTRANODE, LOW_LATENCY) if not Path(path or "", "tests", n).is_file()]
    if path is None or missing:
        raise SystemExit(
            f"--source: got {path}, which has no {' and no '.join(missing)} in its tests, expected "
            "a checkout of DeepEP V1: git clone https://github.com/deepseek-ai/DeepEP && "
            "git -C DeepEP checkout 567632d"
        )
    return path.resolve()


def environment(python: str, folder: Path) -> dict[str, str]:
    """``deep_ep`` is the one at ``folder``, and ninja that of ``python``."""
    return os.environ | prepended({"PYTHONPATH": folder, "PATH": Path(python).parent})


def prepended(firsts: dict[str, Path]) -> dict[str, str]:
    """Variables that are lists of paths, each with one more before what it has."""
    return {
        name: os.pathsep.join([str(first), *filter(None, [os.environ.get(name)])])
        for name, first in firsts.items()
    }


def toolkit() -> Path:
    """Where nvcc says that it is: the one on PATH may be a script that starts it."""
    command = [machine.cuda_tool("nvcc"), "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (top,) = re.findall(r"TOP=(.*)", said)
    return Path(top).resolve()


def versions(python: str, folder: Path) -> Json:
    """Of the DeepEP that has been built at ``folder``, and of what it uses."""
    command, env = [python, "-c", PROBE], environment(python, folder)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ImportError(done.stderr)
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def built(python: str, source: Path, folder: Path) -> tuple[Path, Json]:
    """``source``, if it has been built, or else a copy at ``folder``; and the versions."""
    with contextlib.suppress(ImportError):
        return source, versions(python, source)
    shutil.copytree(source, folder, symlinks=True)
    cuda = toolkit()
    cccl = {"CPLUS_INCLUDE_PATH": cuda / "include/cccl"}  # which the host compiler does not know
    env = {**environment(python, folder), **prepended(cccl)}
    env |= {"CUDA_HOME": str(cuda), "TORCH_CUDA_ARCH_LIST": "9.0"}
    command = [python, "setup.py", "egg_info", "build_ext", "--inplace"]
    try:
        subprocess.run(command, cwd=folder, env=env, check=True)
        return folder, versions(python, folder)
    except (subprocess.CalledProcessError, ImportError) as error:
        raise SystemExit(
            f"{error}\nDeepEP was not built: {python} needs PyTorch, ninja, setuptools and "
            "nvidia-nvshmem-cu13 (give another one with --python), the compiler nvcc, and the "
            "headers of libibverbs."
        ) from None


def measure(python: str, folder: Path, test: str, shape: str, ranks: int) -> Json:
    """The figures of one test, which need not have run to its end."""
    rows, hidden, top_k, experts = sizes_of(shape)
    command = [python, f"tests/{test}", f"--num-processes={ranks}", f"--num-tokens={rows}"]
    command += [f"--hidden={hidden}", f"--num-topk={top_k}", f"--num-experts={experts}"]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(python, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # for its ranks to be stopped with it
    ) as process:
        try:
            text, _ = process.communicate(timeout=DEADLINE_S)
            ended = process.returncode and f"the test ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            ended = f"the test was stopped after {DEADLINE_S} s"
    found = figures(PRINTED[test], text)
    if ended:
        found["error"] = f"{ended}; its last line: {text.rstrip().rpartition(chr(10))[2]}"
    if "error" in found:
        print(text, flush=True)
    return found


def by_turns(options: argparse.Namespace, folder: Path) -> tuple[Json, Path]:
    """Ours goes first: it says how many GPUs there are."""
    names = SMOKE_SHAPES if options.smoke else (SHAPES[0], SHAPES[-1])  # as `quick`
    result: Json = {OURS: [], DEEPEP: [], "shapes": dict(zip(COMPARED, names, strict=True))}
    python, source = str(options.python.absolute()), checkout(options.source)
    with tempfile.TemporaryDirectory() as scratch:
        source, result["versions"] = built(python, source, Path(scratch, "DeepEP"))
        for turn in range(1 if options.smoke else ROUNDS):
            print(f"== {OURS}, round {turn + 1}", flush=True)
            ours = quick.of_build(None, options.smoke)
            ours["machine"]["commit"] = options.commit or ours["machine"]["commit"]
            result[OURS].append(ours)
            theirs: Json = {}
            for test, shape in result["shapes"].items():
                print(f"== {DEEPEP}, {test}, round {turn + 1}", flush=True)
                theirs[test] = measure(python, source, test, shape, ours["ranks"])
            result[DEEPEP].append(theirs)
            device = results.slug(ours["machine"]["device"])
            path = folder / f"gpu-deepep-{device}-x{ours['ranks']}.json"
            results.write(path, result)
    return result, path


def lines(result: Json) -> Iterator[str]:
    last, shapes = result[OURS][-1], result["shapes"]
    ranks, described = last["ranks"], last["machine"]
    yield from (f"# {DEEPEP} beside {OURS} on {ranks} × {described['device']}", "")
    yield f"- {OURS}: {machine_line(described, ranks)}"
    yield f"- {DEEPEP}: {', '.join(map(' '.join, result['versions'].items()))}"
    yield from ("", LEGEND, "")
    yield from comparison(result, (OURS, DEEPEP), lambda run: times(run, shapes))
    yield from ("What DeepEP printed; its GB/s count the rows that stay on their rank:", "")
    head = ["shape", "what", "round", "µs", "least", "most", "GB/s", "SMs"]
    yield from table(head, _printed(result[DEEPEP], shapes))


def _printed(runs: list[Json], shapes: Json) -> Iterator[list[str]]:
    digits = {"us": 1, "min_us": 1, "max_us": 1, "gb_s": 1, "sms": 0}
    for test, shape in shapes.items():
        for what in PRINTED[test]:
            for turn, run in enumerate(runs):
                found = [number(find(run, test, what, n), places) for n, places in digits.items()]
                yield [shape, what, str(turn + 1), *found]


def show_all(result: Json, path: Path) -> None:
    show(path, lines(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, metavar="PATH", help="a checkout of DeepEP V1")
    this = Path(sys.executable)
    parser.add_argument("--python", type=Path, default=this, help="that has PyTorch; default this")
    results.add_options(parser)


def run(options: argparse.Namespace) -> None:
    with results.folder(options) as folder:
        result, path = by_turns(options, folder)
        show_all(result, path)
