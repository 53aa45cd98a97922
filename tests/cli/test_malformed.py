# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with an invocation: exit code 2 and one line, before any work, no traceback."""

import io
import json
import pathlib
import random
from collections.abc import Iterator

import click
import click.testing
import numpy as np
import pytest

from jax_smfree.cli import cli

pytestmark = pytest.mark.cpu_only

EXAMPLES = pathlib.Path(__file__).parents[2] / "docs" / "examples"
PROGRAM, TRACE = EXAMPLES / "forward.hlo", EXAMPLES / "trace.json"

WRONG_NUMBERS = ("", "x", "0", "-1", "nan", "inf", "-inf", "1e400", "9" * 40, "1,2", "0x10", "½")
WRONG_SIZES = (
    "", "x", "1x1", "8x8:2", "8x8:0of8", "0x8:1of8", "8x0:1of8", "8x8:1of0", "8x8:9of8",
    "-8x8:1of8", "8.5x8:1of8", "٣x8:1of8", "8x8:1of8 ", "999999999999x8:1of8",
    "8x999999999:1of8", "8x8:1of999999999", "8x8:99999of100000",
)  # fmt: skip
WRONG_RANKS = ("", ",", "0", "-2", "2,,4", "2,x", "2,0", "3", "4096", "9" * 40, "2.0", "٢")
WRONG_NAMES = ("", "float64", "int8", "FLOAT 32", "1")
# {folder} is an empty folder.
WRONG_OUTPUTS = (
    "", ".", "/", "{folder}", "{folder}/missing/a{ending}", "/proc/none/a{ending}",
    "{folder}/" + "a" * 300 + "{ending}", "/dev/null/a{ending}",
)  # fmt: skip
WRONG_PICTURES = (*WRONG_OUTPUTS, "{folder}/a", "{folder}/a.txt", "{folder}/a.pgf")
WRONG_INPUTS = ("", "{folder}", "{folder}/missing", "a" * 300, "/dev/null")

PLAN = {
    "--shape": WRONG_SIZES,
    "--dtype": WRONG_NAMES,
    "--ranks": WRONG_RANKS,
    "--ranks-per-node": (*WRONG_NUMBERS, "3", "4096"),
    "--lanes": (*WRONG_NUMBERS, "17"),
    "--machine": WRONG_INPUTS,
    "--nvlink-gb-s": WRONG_NUMBERS,
    "--network-gb-s": WRONG_NUMBERS,
    "--hbm-gb-s": WRONG_NUMBERS,
    "--matmul-tflop-s": WRONG_NUMBERS,
    "--routing": WRONG_INPUTS,
    "--plot": WRONG_PICTURES,
}
BENCH = {
    "--shape": (*WRONG_SIZES, "8x8:1of7", "1048576x131072:8of1048576"),
    "--dtype": WRONG_NAMES,
    "--ranks": (*WRONG_NUMBERS, "3", "512", "513"),
    "--budget": WRONG_NUMBERS,
    "--output": WRONG_OUTPUTS,
    "--plot": WRONG_PICTURES,
}
TIMELINE = {"--plot": WRONG_PICTURES, "--perfetto": WRONG_OUTPUTS}
# What stands before the options of a command: it is right, so that the option is what is wrong.
COMMANDS = {
    ("plan",): PLAN,
    ("bench", "--budget", "0.01"): BENCH,
    ("overlap", "timeline", str(TRACE)): TIMELINE,
    ("overlap", "report"): {"": WRONG_INPUTS},
    ("overlap", "timeline", "--plot", "{folder}/a.png"): {"": WRONG_INPUTS},
}
OTHERS = (
    [], ["--shape"], ["nothing"], ["--nothing"], ["doctor", "x"], ["doctor", "--json=1"],
    ["overlap"], ["overlap", "nothing"], ["overlap", "report"], ["overlap", "timeline"],
    ["overlap", "report", str(PROGRAM), "x"], ["overlap", "timeline", str(TRACE)],
    ["overlap", "report", "--steps=1", str(PROGRAM)], ["plan", "x"], ["plan", "--plot"],
    ["plan", "--ranks", "2", "--ranks-per-node"], ["bench", "x"], ["bench", "--json", "1"],
)  # fmt: skip


def cases() -> Iterator[list[str]]:
    yield from OTHERS
    for command, options in COMMANDS.items():
        for name, values in options.items():
            for value in values:
                wrong = value.replace("{ending}", ".png")
                yield [*command, f"{name}={wrong}" if name else wrong]


@pytest.fixture(scope="module", autouse=True)
def started():
    """JAX has started with the devices of the tests before a command asks for its own."""
    import jax

    jax.devices()


def refused(arguments: list[str]) -> None:
    """The command says in one line what is wrong."""
    result = click.testing.CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.output
    if arguments and arguments != ["overlap"]:  # these show their help
        lines = result.stderr.strip().splitlines()
        assert lines[-1].startswith("Error: ") and lines[-1].count("Error") == 1
        usage = lines[:-1]
        assert not usage or usage[0].startswith("Usage: "), result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize("arguments", [*cases()], ids=lambda arguments: " ".join(arguments)[:60])
def test_what_is_malformed(arguments, tmp_path):
    refused([argument.replace("{folder}", str(tmp_path)) for argument in arguments])
    assert list(tmp_path.iterdir()) == []


def damaged(rng: random.Random, content: bytes) -> bytes:
    """A file that was cut, or in which some bytes are missing, doubled or others."""
    begin = rng.randrange(len(content))
    end = begin + rng.choice([1, 2, 8, 64, 512])
    noise = bytes(rng.randrange(256) for _ in range(min(end, len(content)) - begin))
    middle = rng.choice([b"", noise, content[begin:end] * 2])
    return content[:begin] + rng.choice([middle + content[end:], b""])


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results/gpu-nvidia-h200-x2.json"
FILES = {
    "overlap report {file} --json": PROGRAM.read_bytes,
    "overlap timeline {file} --perfetto {folder}/p.json": TRACE.read_bytes,
    "plan --ranks 2 --machine {file} --json": RESULTS.read_bytes,
    "plan --shape 8x8:2of8 --ranks 2 --json --routing {file}": lambda: saved(
        np.random.default_rng(0).integers(0, 8, (50, 2))
    ),
}


@pytest.mark.parametrize("command", FILES)
def test_damaged_files(command, tmp_path):
    """Damage that nobody can see gives a result; any other is refused."""
    rng = random.Random(0)
    content, path = FILES[command](), tmp_path / "damaged"
    arguments = command.format(file=path, folder=tmp_path).split()
    outcomes = []
    for _ in range(100):
        path.write_bytes(damaged(rng, content))
        result = click.testing.CliRunner().invoke(cli, arguments)
        assert isinstance(result.exception, SystemExit | None), repr(result.exception)
        outcomes.append(result.exit_code)
        if result.exit_code:
            refused(arguments)
    assert set(outcomes) <= {0, 2} and 2 in outcomes


@pytest.mark.parametrize(
    "value",
    [
        None, 0, "x", [], {}, {"phases": 1}, {"phases": [1]}, {"phases": [[]], "wire": 5},
        {"phases": [{"rank": "0", "phase": "dispatch_send", "begin_ns": 0, "end_ns": 1}]},
        {"phases": [{"rank": 0, "phase": "send", "begin_ns": 0, "end_ns": 1}]},
        {"phases": [{"rank": 0, "phase": [], "begin_ns": 0, "end_ns": 1}]},
        {"phases": [{"rank": 0, "phase": "dispatch_send", "begin_ns": 2, "end_ns": 1}]},
        {"phases": [{"rank": 0, "phase": "dispatch_send", "begin_ns": 0, "end_ns": 1e300}]},
        {"copy_rate": 1, "gemms": [], "link_ceilings": None, "shapes": {}},
        {"copy_rate": {"gb_s": "1"}, "gemms": {"tflop_s": 1}, "link_ceilings": {}, "shapes": {}},
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_json_of_another_kind(value, tmp_path):
    path = tmp_path / "value.json"
    path.write_text(json.dumps(value))
    refused(["overlap", "timeline", str(path), "--perfetto", str(tmp_path / "p.json")])
    refused(["plan", "--ranks", "2", "--machine", str(path)])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 3), int), np.zeros((4, 2)), np.full((4, 2), 8), np.zeros((0, 2), int),
        np.zeros(4, int), np.array("x"), np.zeros((4, 2), "datetime64[s]"),
        np.array([[None]], dtype=object),
    ],
    ids=str,
)  # fmt: skip
def test_routing_of_another_kind(array, tmp_path):
    path = tmp_path / "ids.npy"
    path.write_bytes(saved(array))
    refused(["plan", "--shape", "8x8:2of8", "--ranks", "2", "--routing", str(path)])
