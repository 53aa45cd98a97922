# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and the committed tables are what the committed results say."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_only

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
COMMANDS = {
    "cpu-amd-epyc-2": ("benchmarks.cpu",),
    "cpu-few-amd-epyc-2": ("benchmarks.cpu",),
    "gpu-nvidia-h200-x2": ("benchmarks.gpu", "operations"),
    "gpu-processes-nvidia-h200-x2": ("benchmarks.gpu", "processes"),
    "gpu-nodes-nvidia-h200-x2": ("benchmarks.gpu", "nodes"),
    "gpu-quick-builds-nvidia-h200-x1": ("benchmarks.gpu", "quick"),
    "gpu-quick-builds-nvidia-h200-x2": ("benchmarks.gpu", "quick"),
    "gpu-quick-builds-areas-nvidia-h200-x2": ("benchmarks.gpu", "quick"),
    "gpu-quick-builds-sets-nvidia-h200-x2": ("benchmarks.gpu", "quick"),
    "gpu-quick-builds-ends-nvidia-h200-x2": ("benchmarks.gpu", "quick"),
    "gpu-decode-nvidia-h200-x2": ("benchmarks.gpu", "decode"),
    "gpu-quick-nvidia-h200-x1": ("benchmarks.gpu", "quick"),
    "gpu-quick-fused-nvidia-h200-x1": ("benchmarks.gpu", "quick"),
}


def python(*arguments):
    """As a user does in a clone, with the devices that a command asks for."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_result_is_shown():
    assert {path.stem for path in RESULTS.glob("*.json")} == set(COMMANDS)


@pytest.mark.parametrize(("stem", "command"), COMMANDS.items())
def test_tables_are_made_of_results(stem, command, tmp_path):
    copy = tmp_path / f"{stem}.json"
    copy.write_bytes((RESULTS / copy.name).read_bytes())
    python("-m", *command, "--load", copy)
    table = copy.with_suffix(".md")
    assert table.read_text() == (RESULTS / table.name).read_text()


def test_one_line_per_case(tmp_path):
    """What is written is the value that was given, with every case on a line."""
    path = tmp_path / "results.json"
    cases = [{"rows": rows, "us": {"ours": {"p50": 1.5}}} for rows in (1, 2, 3)]
    value = {"machine": {"jax": "0"}, "cases": cases, "shapes": {"a": {"movers": {"b": cases}}}}
    code = "import sys, json, pathlib; from benchmarks import results; "
    code += "results.write(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))"
    python("-c", code, path, json.dumps(value))
    assert json.loads(path.read_text()) == value
    lines = [line.strip().rstrip(",") for line in path.read_text().splitlines()]
    assert all(lines.count(json.dumps(case)) == 2 for case in cases)


def test_round_trips_of_a_trace():
    """Of the ranks the slowest; a step that the trace has the end of alone is left out."""

    def phase(rank, name, begin_ns, end_ns):
        return {"rank": rank, "phase": name, "begin_ns": begin_ns, "end_ns": end_ns}

    records = [phase(0, "combine_recv", 0, 500)]
    for rank, lasts_ns in ((0, 3_000), (1, 7_000)):
        for step in (1, 2):
            begin = step * 100_000
            records.append(phase(rank, "dispatch_send", begin, begin + 1_000))
            records.append(phase(rank, "combine_recv", begin + 2_000, begin + step * lasts_ns))
    code = "import json, sys; from benchmarks.gpu import jitter; "
    code += "print(jitter.round_trips(json.loads(sys.argv[1])))"
    assert python("-c", code, json.dumps(records)).strip() == "[7.0, 14.0]"


def test_cpu(tmp_path):
    python("-m", "benchmarks.cpu", "--smoke", "--out", tmp_path)
    (path,) = tmp_path.glob("*.json")
    cases = json.loads(path.read_text())["cases"]
    assert [(case["ranks"], case["processes"]) for case in cases] == [(1, 1), (2, 1), (4, 2)]
    assert all(case["times_us"]["jax_smfree"]["median"] > 0 for case in cases)
    assert path.with_suffix(".md").exists() and path.with_suffix(".png").exists()


@pytest.mark.parametrize("command", ["quick", "decode"])
def test_gpu(tmp_path, command):
    text = python("-m", "benchmarks.gpu", command, "--smoke", "--out", tmp_path)
    assert "Not measured" not in text
    (path,) = tmp_path.glob("*.json")
    for shape in json.loads(path.read_text())["shapes"].values():
        assert shape["movers"]["default"]["native"]["round_trip"]["p50"] > 0


def test_layer(tmp_path):
    """All steps are right and timed, and keep what docs/moe_layer.md says of received rows."""
    text = python("-m", "benchmarks.gpu", "layer", "--smoke", "--out", tmp_path)
    assert "Not measured" not in text and "no kernels in the profile" in text
    (path,) = tmp_path.glob("*.json")
    for shape in json.loads(path.read_text())["shapes"].values():
        steps, received = shape["steps"], 2 * shape["capacity"]  # bytes of a column in bfloat16
        assert all(step["p50"] > 0 and step["tflop_s"] >= 0 for step in steps.values())
        kept = {name: step["kept_of_rows_bytes"] for name, step in steps.items()}
        rows, width = received * shape["hidden"], received * shape["expert"]
        weights = 2 * received  # float32
        assert kept["nothing kept"] == 0
        assert kept["hidden, save_comm_policy"] == rows + weights
        assert kept["hidden, save_mlp_policy"] == 2 * width
        assert kept["hidden, both policies"] == rows + 2 * width + weights
        assert 2 * kept["hidden, both policies"] < kept["default"]


def test_kernels_of_a_profile():
    """By names, per call; where one kernel runs under another there is no gap."""
    smfree, local = "smfree::cuda::", "smfree::cuda::(anonymous namespace)::"
    pack = f"{local}Pack<{local}PlainRows>({smfree}KernelParams"
    names = {
        "grouped_matmul_mosaic_gpu_kernel": (0, 4_000),
        "grouped_matmul_transposed_mosaic_gpu_kernel": (5_000, 8_000),
        "loop_multiply_fusion_3": (6_000, 7_000),
        f"void {pack}, {smfree}RowsIn, {smfree}HandlePlaces)": (8_000, 9_000),
        f"void {pack}, {smfree}CombineSendArrays)": (9_000, 11_000),
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT": (11_000, 12_000),
        "MemcpyP2P": (4_000, 12_000),
    }
    events, metadata = "", ""
    for key, (name, (begin, end)) in enumerate(names.items(), 1):
        span = f"offset_ps: {begin}000 duration_ps: {end - begin}000"
        events += f"events {{ metadata_id: {key} {span} }} "
        metadata += f'event_metadata {{ key: {key} value {{ id: {key} name: "{name}" }} }} '
    lines = f'lines {{ name: "Stream #7(Compute)" {events} }} lines {{ name: "other" {events} }}'
    plane = f'planes {{ name: "/device:GPU:0" {lines} {metadata} }}'
    code = "import json, sys, jax; from benchmarks.gpu import kernel_times; "
    code += "data = jax.profiler.ProfileData; "
    code += "profile = data(data.text_proto_to_serialized_xspace(sys.argv[1])); "
    code += "print(json.dumps(kernel_times.of_profile(profile, 2)))"
    found = json.loads(python("-c", code, plane))
    assert (found["step_us"], found["gap_us"]) == (6.0, 0.5)
    assert {name: group["us"] for name, group in found["groups"].items()} == {
        "grouped matmul, dx": 1.5,
        "grouped matmul, forward": 2.0,
        "combine send": 1.0,
        "dispatch send": 0.5,
        "dense matmuls": 0.5,
        "fusions of XLA": 0.5,
        "copies and fills": 4.0,
    }
    assert list(found["groups"]["dispatch send"]["kernels"]) == ["Pack"]
