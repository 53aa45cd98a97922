# SPDX-License-Identifier: Apache-2.0
"""The main job, for a few steps: it runs, agrees with the reference, and leaves its pictures."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("flags", [[], ["--processes", "2"]], ids=["threads", "processes"])
def test_a_few_steps(flags: list[str], tmp_path: pathlib.Path) -> None:
    script = ROOT / "examples" / "train_moe_lm.py"
    command = [sys.executable, script, "--steps", "5", "--out", tmp_path / "pictures", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "equal to rounding" in output
    assert f"{len(flags) or 1} process(es)" in output
    assert "--- continued" in output
    for name in ("loss.png", "expert_load.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_text_is_the_same_every_time_and_nothing_is_held_out_and_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import stdlib_text

    one, other = stdlib_text.load(), stdlib_text.load()
    assert (one.train == other.train).all()
    assert (one.batch(7, 2, 65) == other.batch(7, 2, 65)).all()
    assert (one.batch(7, 2, 65) != one.batch(8, 2, 65)).any()
    (held_out,) = one.held_out_batches(1, sequences=4, length=200)
    train = one.train.tobytes()
    assert sum(bytes(row.tolist()) in train for row in held_out) == 0
