# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import inspect
from support import ep_mesh

pytestmark = pytest.mark.cpu_only

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results/gpu-nvidia-h200-x2.json"


@pytest.fixture
def program(groups, tmp_path):
    """The text of a compiled round trip with a matmul under its dispatch."""
    mesh = ep_mesh(4)
    group = groups(mesh, num_experts=4, top_k=1, hidden=8, max_tokens=4, dtype="float32")

    def block(x, idx):
        token = smfree.dispatch_send(group.token(), x, idx)
        token, y = smfree.overlap(token, lambda x: x @ x.T, x)
        d, token = smfree.dispatch_recv(token)
        out, _ = smfree.combine(token, d, d.x)
        return out + y.sum()

    step = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    compiled = step.lower(jnp.ones((16, 8)), jnp.zeros((16, 1), jnp.int32)).compile()
    path = tmp_path / "step.hlo"
    path.write_text(compiled.as_text())
    return path


@pytest.fixture(scope="module")
def recorded():
    """A timeline that was recorded on two H200."""
    shape = json.loads(RESULTS.read_text())["shapes"]["8192x7168:8of256"]
    return shape["movers"]["copy engine"]["overlap"]["timeline"]


def test_report(run, program):
    text = run("overlap", "report", program, "--steps").output
    assert "dispatch" in text and "combine" in text
    assert "test_overlap.py:" in text
    # Nothing was put under the combine.
    assert "Run work there with smfree.overlap(token, fn, *args)" in text.replace("\n", " ")


def test_strict_reports_with_exit_code_1(run, program):
    run("overlap", "report", program, "--strict", exit_code=1)


def test_strict_fails_where_there_is_nothing_to_look_at(run, tmp_path):
    path = tmp_path / "empty.hlo"
    path.write_text(jax.jit(lambda x: x @ x).lower(jnp.ones((2, 2))).compile().as_text())
    assert run("overlap", "report", path).output == "no sends or recvs\n"
    for options in ((), ("--json",)):
        output = run("overlap", "report", path, "--strict", *options, exit_code=1).output
        assert "the program has no operation of jax_smfree" in output


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_program(run, program, share):
    text = program.read_text().rstrip()
    program.write_text(text[: int(share * len(text))])
    output = run("overlap", "report", program, exit_code=2).output
    assert "expected" in output and "operation" not in output


def test_report_as_json(run, program):
    value = json.loads(run("overlap", "report", program, "--json").output)
    assert {w["operation"] for w in value["windows"]} == {"dispatch", "combine"}
    assert value["orphans"] == []
    assert value["warnings"] == list(inspect.overlap_report(program.read_text()).warnings)


def test_a_file_that_is_no_compiled_program(run):
    assert "not scheduled" in run("overlap", "report", __file__, exit_code=2).output


def test_timeline_files(run, recorded, tmp_path):
    trace, plot, perfetto = (tmp_path / name for name in ("t.json", "t.png", "p.json"))
    trace.write_text(json.dumps(recorded))
    run("overlap", "timeline", trace, "--plot", plot, "--perfetto", perfetto)
    assert plot.read_bytes().startswith(b"\x89PNG")
    events = json.loads(perfetto.read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == len(recorded["phases"]) + len(recorded["wire"])
    for event in slices:
        assert event["ts"] >= 0 and event["dur"] > 0
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"replica 0, rank 0", "replica 0, rank 1"}


def test_copies_are_threads_of_their_rank():
    phase = {"rank": 0, "phase": "dispatch_send", "begin_ns": 1000, "end_ns": 3000}
    copy = {"rank": 0, "peer": 2, "begin_ns": 2000, "end_ns": 9000, "bytes": 64}
    timeline = inspect.Timeline([phase], [copy])
    (event,) = (
        e for e in timeline.trace_events()["traceEvents"] if e.get("tid") == 3 and "ts" in e
    )
    assert (event["ts"], event["dur"], event["args"]["bytes"]) == (1.0, 7.0, 64)


def test_clocks_that_differ_are_not_compared():
    phases = [
        {"rank": rank, "phase": "dispatch_send", "begin_ns": begin, "end_ns": begin + 1000}
        for rank, begin in ((0, 0), (1, 10**12))
    ]
    timeline = inspect.Timeline(phases)
    assert not timeline.has_one_clock
    assert [timeline.span_us(p) for p in phases] == [(0.0, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "without a list 'phases'"),
        ({"phases": []}, "got no phases"),
        ({"phases": [{"rank": 0}]}, "without ['begin_ns', 'end_ns', 'phase']"),
    ],
)
def test_what_is_no_trace_is_refused(run, tmp_path, value, message):
    trace = tmp_path / "t.json"
    trace.write_text(json.dumps(value))
    output = run("overlap", "timeline", trace, "--plot", tmp_path / "t.png", exit_code=2).output
    assert message in output


def test_a_file_that_is_no_json(run, tmp_path):
    output = run("overlap", "timeline", __file__, "--plot", tmp_path / "t.png", exit_code=2).output
    assert "expected a JSON file" in output


def test_a_timeline_goes_somewhere(run, tmp_path):
    trace = tmp_path / "t.json"
    trace.write_text("{}")
    assert "neither --plot nor --perfetto" in run("overlap", "timeline", trace, exit_code=2).output
