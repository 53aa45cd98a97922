# SPDX-License-Identifier: Apache-2.0
"""The main job, for a few steps: it runs, agrees with the reference, and leaves its pictures."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_only

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "processes, router, wire", [(1, "deepseek-v3", "fp8"), (2, "softmax", "float32")]
)
def test_a_few_steps(processes: int, router: str, wire: str, tmp_path: pathlib.Path) -> None:
    script = ROOT / "examples" / "train_moe_lm.py"
    flags = ["--processes", str(processes), "--router", router, "--wire", wire]
    command = [sys.executable, script, "--steps", "5", "--out", tmp_path / "pictures", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "equal to rounding" in output
    assert f"{processes} process(es)" in output
    assert "--- continued" in output
    for name in ("loss.png", "expert_load.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_text_is_in_a_fixed_order_and_split_by_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import stdlib_text

    for number in reversed(range(40)):
        (tmp_path / f"file{number:02}.py").write_bytes(bytes([number]) * 50)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_bytes(bytes([255]))
    monkeypatch.setattr(stdlib_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})

    corpus = stdlib_text.load()
    assert corpus.held_out.tolist() == [0] * 50 + [20] * 50
    assert sorted({*corpus.train.tolist()}) == [n for n in range(40) if n % 20]
    assert (corpus.train[1:] >= corpus.train[:-1]).all()
    assert (corpus.batch(7, 2, 65) == corpus.batch(7, 2, 65)).all()
    assert (corpus.batch(7, 2, 65) != corpus.batch(8, 2, 65)).any()
    (windows,) = corpus.held_out_batches(1, sequences=4, length=30)
    assert set(windows.flat) <= {0, 20}
