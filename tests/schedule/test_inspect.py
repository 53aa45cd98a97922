# SPDX-License-Identifier: Apache-2.0
"""`jax_smfree.inspect` on small programs, intact and broken ones. Needs no CUDA plugin."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import inspect
from jax_smfree._src import targets

pytestmark = pytest.mark.cpu_only

FORWARD = (
    "backend_config={call_site = 7 : i64, derivation = 0 : i64, group = 1 : i64, lane = 1 : i64}"
)
REPLAY = FORWARD.replace("derivation = 0", "derivation = 3")
SEND = f'custom_call_target="smfree_dispatch_send_cached", {FORWARD}'
RECV = f'custom_call_target="smfree_dispatch_recv_cached", {FORWARD}'
DOT = "bf16[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def program(*lines: str, computations: str = "") -> str:
    """A scheduled program with a token ``%t`` and rows ``%x``."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule jit_f, is_scheduled=true, entry_computation_layout={{()->()}}

{computations}
ENTRY %main (t: f32[6], x: bf16[4,4]) -> f32[6] {{
  %t = f32[6]{{0}} parameter(0)
  %x = bf16[4,4]{{1,0}} parameter(1)
{body}
  ROOT %copy.9 = f32[6]{{0}} copy(%t)
}}
"""


def send(name: str = "send", operands: str = "%t, %x") -> str:
    return f"%{name} = f32[6]{{0}} custom-call({operands}), {SEND}"


def recv(name: str, token: str) -> str:
    return f"%{name} = (f32[6]{{0:S(5)}}, /*index=1*/bf16[4,4]{{1,0}}) custom-call({token}), {RECV}"


def test_a_window_holds_the_work_in_order():
    text = program(
        send(),
        f'%dot = {DOT}, metadata={{op_name="jit(f)/shared/dot_general" stack_frame_id=3}}',
        "%start = (f32[1], f32[2]) all-gather-start(%x), dimensions={0}",
        "%bitcast = bf16[16]{0} bitcast(%dot)",
        "%copy = bf16[16]{0} copy(%bitcast)",
        recv("recv", "%send"),
    )
    (window,) = inspect.overlap(text)
    assert inspect.orphans(text) == []
    assert (window.operation, window.lane, window.derivation) == ("dispatch", 1, 0)
    assert (window.computation, window.send, window.recv) == ("main", "send", "recv")
    assert window.between == (
        inspect.Step("dot", "matmul", "jit(f)/shared/dot_general", flops=2 * 4**3, bytes=96),
        inspect.Step("start", "collective", "", bytes=32 + 12),
        inspect.Step("copy", "kernel", "", bytes=64),
    )
    assert window.matmuls == window.between[:1]
    assert (window.flops, window.bytes) == (128, 96 + 64)
    assert str(window) == (
        "dispatch, lane 1, forward, call site 0x00000007 (main): "
        "1 matmuls, 2 other between send and recv"
    )


def test_the_token_is_followed_through_what_leaves_it_as_it_is():
    text = program(
        send(),
        "%pair = (bf16[4,4]{1,0}, f32[6]{0}) tuple(%x, %send)",
        "%nest = ((bf16[4,4]{1,0}, f32[6]{0}), s32[]) tuple(%pair, %x)",
        "%barrier = ((bf16[4,4]{1,0}, f32[6]{0}), s32[]) opt-barrier(%nest)",
        "%outer = (bf16[4,4]{1,0}, f32[6]{0}) get-tuple-element(%barrier), index=0",
        "%inner = f32[6]{0} get-tuple-element(%outer), index=1",
        "%precise = f32[6]{0} reduce-precision(%inner), exponent_bits=8, mantissa_bits=23",
        "%fused = (bf16[4,4]{1,0}, f32[6]{0}) fusion(%precise, %x), kind=kLoop, calls=%copies",
        "%token = f32[6]{0} get-tuple-element(%fused), index=1",
        recv("recv", "%token"),
        computations="""%copies (p0: f32[6], p1: bf16[4,4]) -> (bf16[4,4], f32[6]) {
  %p0 = f32[6]{0} parameter(0)
  %p1 = bf16[4,4]{1,0} parameter(1)
  %copied = f32[6]{0} copy(%p0)
  ROOT %both = (bf16[4,4]{1,0}, f32[6]{0}) tuple(%p1, %copied)
}
""",
    )
    assert [w.send for w in inspect.overlap(text)] == ["send"]
    assert inspect.orphans(text) == []


def test_halves_inside_of_fusions_and_asynchronous_wrappers():
    text = program(
        "%fused_send = f32[6]{0} fusion(%t, %x), kind=kCustom, calls=%slice_send",
        f"%dot = {DOT}",
        "%start = ((f32[6]{0}), f32[6]{0}) async-start(%fused_send), calls=%wrapped_recv",
        "%done = f32[6]{0} async-done(%start)",
        computations=f"""%slice_send (p0: f32[6], p1: bf16[4,4]) -> f32[6] {{
  %p0 = f32[6]{{0}} parameter(0)
  %p1 = bf16[4,4]{{1,0}} parameter(1)
  %slice = bf16[2,4]{{1,0}} slice(%p1), slice={{[0:2], [0:4]}}
  ROOT {send("inner", "%p0, %slice")}
}}

%wrapped_recv (p2: f32[6]) -> f32[6] {{
  %p2 = f32[6]{{0}} parameter(0)
  ROOT {recv("waiting", "%p2")}
}}
""",
    )
    (window,) = inspect.overlap(text)
    assert (window.send, window.recv) == ("fused_send", "start")
    assert [s.kind for s in window.between] == ["matmul"]
    assert inspect.orphans(text) == []


@pytest.mark.parametrize(
    ("lines", "phase", "reason"),
    [
        ([send()], "send", "is never received"),
        ([recv("recv", "%t")], "recv", "gets its token from no send of this computation"),
        (
            [send(), recv("recv", "%send"), recv("recv.clone", "%send")],
            "recv",
            "is a clone of recv: both receive from send",
        ),
    ],
)
def test_halves_without_counterpart_are_orphans(lines, phase, reason):
    text = program(*lines)
    (orphan,) = inspect.orphans(text)
    assert (orphan.phase, orphan.reason) == (phase, reason)
    report = inspect.overlap_report(text)
    assert report.orphans == (orphan,)
    assert f"WARNING {orphan}: keep send and recv in one control-flow region" in str(report)


def test_interleaved_replays_are_told_apart_by_their_tokens():
    text = program(
        send("a"), send("b"), recv("of_b", "%b"), recv("of_a", "%a")
    ).replace(FORWARD, REPLAY)  # fmt: skip
    windows = inspect.overlap(text)
    assert [(w.send, w.recv) for w in windows] == [("b", "of_b"), ("a", "of_a")]
    assert [s.kind for w in windows for s in w.between] == ["exchange", "exchange"]
    assert all(w.is_replay and not w.is_backward for w in windows)


def test_the_tables_of_a_program_name_its_call_sites():
    tables = """
FileNames
1 "/home/me/model.py"

FunctionNames
1 "Model.moe"

FileLocations
1 {file_name_id=1 function_name_id=1 line=31 end_line=31 column=4 end_column=9}

"""
    site = "call_site = " + str(targets.call_site_number("model.py:31 in moe"))
    text = program(send(), recv("recv", "%send")).replace("call_site = 7", site)
    assert [w.call_site for w in inspect.overlap(text)] != ["model.py:31 in moe"]
    (window,) = inspect.overlap(text.replace("\n", "\n" + tables, 1))
    assert window.call_site == "model.py:31 in moe"


def test_a_program_without_operations_reports_none():
    report = smfree.overlap_report(program())
    assert str(report) == "no sends or recvs"
    assert report.warnings == ()


WINDOWS = {
    "nothing": ([], "the recv waits for all rows"),
    "a kernel": (["%copy = bf16[4,4]{1,0} copy(%x)"], "without a matrix multiplication"),
    "a matmul": ([f"%dot = {DOT}"], None),
    "a collective": (
        [f"%dot = {DOT}", "%sum = bf16[4,4]{1,0} all-reduce(%x), to_apply=%add"],
        "shares the links",
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_warnings_say_what_takes_the_overlap_away(name):
    between, warning = WINDOWS[name]
    add = "%add (a: bf16[], b: bf16[]) -> bf16[] {\n  ROOT %a = bf16[] parameter(0)\n}"
    lines = [send(), *between, recv("recv", "%send")]
    report = smfree.overlap_report(program(*lines, computations=add))
    assert len(report.warnings) == (warning is not None)
    for text in report.warnings:
        assert warning in text


CUBLAS = (
    "%mm = (bf16[4,8]{1,0}, s8[4096]{0}) custom-call(%x, %x), "
    'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
    '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
)
BODY = f"""%body (p: bf16[4,4]) -> bf16[4,4] {{
  %x = bf16[4,4]{{1,0}} parameter(0)
  ROOT %dot.1 = {DOT}
}}"""
LOOP = "%loop = bf16[4,4]{1,0} while(%x), condition=%body, body=%body"
PALLAS = (
    "%kernel = bf16[4,4]{1,0} custom-call(%x), "
    'custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/grouped_matmul/pallas_call"}'
)
MATMULS = {
    "dot": (f"%dot = {DOT}", 2 * 4**3),
    "cublas": (CUBLAS, 2 * 4 * 8 * 4),
    "fusion": ("%fused = bf16[4,4]{1,0} fusion(%x), kind=kOutput, calls=%body", 2 * 4**3),
    "loop": (LOOP + ', backend_config={"known_trip_count":{"n":"3"}}', 2 * 3 * 2 * 4**3),
    "loop of unknown length": (LOOP, None),
    "kernel of Pallas": (PALLAS, None),
    "gradient of a ragged dot": (
        "%ragged = bf16[2,4,4]{2,1,0} ragged-dot(%x, %x, %t), lhs_contracting_dims={0}, "
        "rhs_contracting_dims={0}, lhs_ragged_dims={0}",
        2 * 4**3,
    ),
}


@pytest.mark.parametrize("name", MATMULS)
def test_flops_of_matmuls(name):
    line, flops = MATMULS[name]
    text = program(send(), line, recv("recv", "%send"), computations=BODY)
    (window,) = inspect.overlap(text)
    assert [s.kind for s in window.between] == ["matmul"]
    assert window.flops == flops


def test_a_program_that_is_not_compiled_is_refused():
    lowered = jax.jit(jnp.sin).lower(1.0)
    with pytest.raises(ValueError, match="not scheduled"):
        inspect.overlap(lowered.as_text())


def test_a_program_compiled_for_cpus():
    mesh = Mesh(jax.devices()[:4], ("ep",))
    config = smfree.EpConfig(num_experts=4, top_k=1, hidden=8, max_tokens=4, dtype=jnp.float32)

    def block(x, idx, w):
        token = smfree.dispatch_send(group.token(), x, idx)
        token, y = smfree.overlap(token, lambda x, w: x @ w, x, w)
        d, token = smfree.dispatch_recv(token)
        out, _ = smfree.combine(token, d, d.x)
        return out + y

    def loss(x, idx, w):
        specs = (P("ep"), P("ep"), P())
        return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=P("ep"))(x, idx, w).sum()

    with smfree.EpGroup.create(mesh, config=config) as group:
        arguments = (jnp.ones((16, 8)), jnp.zeros((16, 1), jnp.int32), jnp.ones((8, 8)))
        step = jax.jit(jax.value_and_grad(loss, (0, 2)))
        windows = inspect.overlap(step.lower(*arguments).compile())

    assert {(w.operation, w.is_backward) for w in windows} == {
        (operation, backward) for operation in ("dispatch", "combine") for backward in (False, True)
    }
    (dispatch,) = [w for w in windows if w.operation == "dispatch" and not w.is_backward]
    assert dispatch.call_site.startswith("test_inspect.py:")
    assert dispatch.call_site.endswith(" in block")
