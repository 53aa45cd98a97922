# SPDX-License-Identifier: Apache-2.0
"""DeepEP beside the library, of a checkout whose tests only print: what they print is read."""

import argparse
import json
import pathlib
import sys
import textwrap

import pytest

import clone  # noqa: F401  (for benchmarks)
from benchmarks.gpu import deepep
from benchmarks.gpu.deepep_figures import (
    COMPARED,
    INTRANODE,
    LOW_LATENCY,
    PHASES,
    PRINTED,
    figures,
    times,
)

pytestmark = pytest.mark.cpu_only

LINES = {
    INTRANODE: """\
[config] num_tokens=8192, hidden=7168, num_topk=8
[layout] Kernel performance: 0.041 ms

[testing] Running with BF16, with top-k (async=False, previous=False) ... passed

[tuning] SMs 24, NVL chunk 4: 210.01 GB/s (NVL), 573.50 us
[tuning] SMs 24, NVL chunk default: 262.50 GB/s (NVL), 458.81 us
[tuning] Best dispatch (FP8): SMs 24, NVL chunk 12, 263.54 GB/s (NVL), t: 457.02 us

[tuning] SMs 24, NVL chunk 4: 320.10 GB/s (NVL), 729.75 us
[tuning] Best dispatch (BF16): SMs 24, NVL chunk 32, 355.21 GB/s (NVL), t: 657.64 us

[tuning] SMs 24, NVL chunk 1: 101.30 GB/s (NVL), 2305.94 us
[tuning] Best combine: SMs 24, NVL chunk 7: 295.42 GB/s (NVL), t: 790.73 us

""",
    LOW_LATENCY: """\
Allocating buffer size: 1908.410496 MB ...
[rank 0] Dispatch + combine bandwidth: 295.23 GB/s, avg_t=74.31 us, min_t=69.98 us, max_t=90.43 us
[rank 1] Dispatch + combine bandwidth: 290.88 GB/s, avg_t=75.42 us, min_t=70.50 us, max_t=88.12 us
[rank 0] Dispatch bandwidth: 270.41 GB/s, avg_t=27.75 us | Combine bandwidth: 354.92 GB/s, avg_t=40.91 us
[rank 1] Dispatch bandwidth: 260.05 GB/s, avg_t=28.86 us | Combine bandwidth: 359.01 GB/s, avg_t=40.44 us
[rank 1] Dispatch send/recv time: 19.42 + 8.06 us | Combine send/recv time: 31.20 + 10.11 us
[rank 0] Dispatch send/recv time: 19.10 + 8.30 us | Combine send/recv time: 33.97 + 10.02 us
""",  # noqa: E501
}
SHAPES = {INTRANODE: "8192x7168:8of256", LOW_LATENCY: "128x7168:8of256"}


@pytest.fixture
def source(tmp_path):
    """A checkout that has been built, of a DeepEP that prints `LINES`."""
    folder = tmp_path / "DeepEP"
    files = {f"tests/{test}": f"print({text!r})" for test, text in LINES.items()}
    files |= {"deep_ep/__init__.py": "", "torch.py": "__version__ = '2.0'"}
    files["deep_ep.egg-info/PKG-INFO"] = "Metadata-Version: 2.1\nName: deep_ep\nVersion: 1.2+abc\n"
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_what_is_read():
    run = {test: figures(PRINTED[test], text) for test, text in LINES.items()}
    assert run[INTRANODE]["dispatch, bf16"] == {"sms": 24, "gb_s": 355.21, "us": 657.64}
    pair = {"gb_s": 290.88, "us": 75.42, "min_us": 70.5, "max_us": 88.12}
    assert run[LOW_LATENCY]["dispatch and combine"] == pair  # of the slower rank
    found = {(shape.partition("x")[0], what): us for shape, what, us in times(run, SHAPES)}
    assert found == {
        ("8192", "dispatch, bf16"): 657.64,
        ("8192", "dispatch, fp8 values and scales"): 457.02,
        ("8192", "combine"): 790.73,
        ("128", "dispatch, fp8 values and scales"): 28.86,
        ("128", "combine"): 40.91,
        ("128", "dispatch and combine"): 75.42,
        ("128", "dispatch send"): 19.42,
        ("128", "dispatch recv"): 8.30,
        ("128", "combine send"): 33.97,
        ("128", "combine recv"): 10.11,
        ("128", "four phases"): pytest.approx(71.80),
    }


def test_a_part_of_what_should_be_there():
    text = LINES[INTRANODE].partition("[tuning] Best combine")[0]
    found = figures(PRINTED[INTRANODE], text)
    assert found.pop("error") == "the test has not printed combine"
    assert list(found) == ["dispatch, bf16", "dispatch, fp8 values and scales"]


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("import sys; sys.exit('out of memory')", "the test ended with 1; its last line: out of"),
        ("import time; time.sleep(600)", "the test was stopped after 3 s"),
    ],
)
def test_a_test_that_fails(source, monkeypatch, end, error):
    """What it has printed before counts."""
    monkeypatch.setattr(deepep, "DEADLINE_S", 3)
    path = source / "tests" / LOW_LATENCY
    path.write_text(f"print({LINES[LOW_LATENCY]!r}, flush=True)\n{end}\n")
    found = deepep.measure(sys.executable, source, LOW_LATENCY, SHAPES[LOW_LATENCY], 2)
    assert error in found.pop("error")
    assert set(found) == set(PRINTED[LOW_LATENCY])


@pytest.mark.parametrize("there", [None, LOW_LATENCY])
def test_no_checkout(tmp_path, there):
    if there:
        (tmp_path / "tests").mkdir()
        (tmp_path / "tests" / there).touch()
    with pytest.raises(SystemExit, match=r"no test_intranode.py.* expected a checkout of DeepEP"):
        deepep.checkout(tmp_path)


def test_what_building_needs(source, tmp_path, monkeypatch):
    (source / "deep_ep/__init__.py").write_text("import deep_ep_cpp")
    (source / "setup.py").write_text("import deep_ep_cpp")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(deepep.machine, "cuda_tool", lambda name: str(nvcc))
    with pytest.raises(SystemExit, match=r"DeepEP was not built: .* needs PyTorch, ninja"):
        deepep.built(sys.executable, source, tmp_path / "copy")
    (source / "setup.py").write_text(
        textwrap.dedent("""\
        import os, pathlib
        include = pathlib.Path(os.environ["CPLUS_INCLUDE_PATH"].split(":")[0])
        assert include == pathlib.Path(os.environ["CUDA_HOME"], "include/cccl")
        pathlib.Path("deep_ep_cpp.py").touch()
        """)
    )
    folder, versions = deepep.built(sys.executable, source, tmp_path / "another")
    assert folder == tmp_path / "another"
    assert versions == {"deep_ep": "1.2+abc", "torch": "2.0"}
    assert not (source / "deep_ep_cpp.py").exists()


def test_by_turns(source, tmp_path, monkeypatch):
    """Tables of a run, ours being one that `quick` has written elsewhere."""
    phase, device = {"p50": 10.0}, {"p50": 90.0, "on_device": {"p50": 40.0}}
    mover = {
        "native": dict.fromkeys(("dispatch", "combine", "round_trip"), device),
        "phases": dict.fromkeys((path for _, path in PHASES.values()), phase) | {"total": phase},
    }
    machine = dict.fromkeys(
        ("date", "commit", "nvcc", "jax", "python", "cpu", "cores", "memory_gib"), "1"
    )
    machine |= {"device": "Some GPU", "gpu": {}, "load_average": [0.0]}
    shapes = {shape: {"movers": {"default": mover}} for shape in SHAPES.values()}
    ours = {"machine": machine, "ranks": 2, "shapes": shapes}
    monkeypatch.setattr(deepep.quick, "of_build", lambda build, smoke: json.loads(json.dumps(ours)))
    options = argparse.Namespace(
        source=source,
        python=pathlib.Path(sys.executable),
        commit="abc",
        smoke=False,
        load=None,
        out=tmp_path,
    )
    deepep.run(options)
    path = tmp_path / "gpu-deepep-some-gpu-x2.json"
    text = path.with_suffix(".md").read_text()
    assert "DeepEP V1: deep_ep 1.2+abc, torch 2.0" in text and "commit abc" in text
    for row in (
        "| 8192x7168:8of256 | dispatch, bf16 | 90 | 657.64 | 7.307 |",
        "| 128x7168:8of256 | dispatch, bf16 | 40 | – |  |",
        "| 128x7168:8of256 | combine | 40 | 40.91 | 1.023 |",
        "| 128x7168:8of256 | dispatch, fp8 values and scales | – | 28.86 |  |",
        "| 128x7168:8of256 | dispatch and combine | 2 | 75.4 | 70.5 | 88.1 | 290.9 | – |",
    ):
        assert row in text
    assert "Not measured" not in text
    assert {what for of_test in COMPARED.values() for what in of_test} <= set(text.split(" | "))
    path.with_suffix(".md").unlink()
    options.load = path
    deepep.run(options)
    assert path.with_suffix(".md").read_text() == text
