# SPDX-License-Identifier: Apache-2.0
"""Every public function, with every argument replaced by things that it is not.

Whatever is wrong is refused on purpose: by a ``SmfreeError``, or a ``TypeError`` or ``ValueError``
of a ``raise`` statement of this package, which says what it expected. No error of the machinery
underneath gets through. What is taken may be right: 3 is a good size.
"""

import functools
import json
import os
import pathlib
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import inspect, nn, plan, testing
from support import as_many, ep_mesh

# A JAX function that is given an iterator: JAX will refuse it, too.
pytestmark = pytest.mark.filterwarnings("ignore:Python iterable type:DeprecationWarning")

PACKAGE = os.path.dirname(smfree.__file__) + os.sep
EXPERTS, TOP_K, HIDDEN, WIDTH, ROWS = 8, 2, 16, 24, 4
SIZES = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": ROWS}


def values():
    """Things of many types and shapes, by what they are. Some are right for some arguments."""

    def function(*_):
        return None

    key = jax.random.key(0)
    numbers = [
        0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**400, 0.5, -1.5, 1e10, float("nan"), float("inf"),
        1j, True, False, np.int64(3), np.float32(2.0), np.bool_(True), np.datetime64("2026-01-01"),
    ]  # fmt: skip
    others = [
        None, "", "x", "direct", "float32", b"x", [], [3], ["x", None], (), (2, 4), {}, {"a": 1},
        {3}, object(), function, int, Exception, range(3), Ellipsis, slice(2), jnp.float32,
        np.dtype("int8"), P("ep"), iter([1, 2]),
    ]  # fmt: skip
    shapes = [(), (0,), (1,), (3,), (EXPERTS,), (0, HIDDEN), (1, 1), (ROWS, HIDDEN), (ROWS, TOP_K),
              (EXPERTS, HIDDEN), (HIDDEN, EXPERTS), (2, 2, 2), (1, 1, 1, 1)]  # fmt: skip
    arrays = [jnp.zeros(shape, jnp.float32) for shape in shapes]
    arrays += [np.ones(shape, np.int32) for shape in shapes]
    arrays += [jnp.ones((ROWS, HIDDEN), dtype)
               for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int4, jnp.uint32, bool, complex)
               ]  # fmt: skip
    arrays += [
        np.array(["a", "b"]), np.array([object()]), np.zeros((2,), [("a", int)]),
        np.zeros((ROWS, HIDDEN), np.float64), np.zeros((0, 0)), key, jax.random.split(key, 2),
        jax.ShapeDtypeStruct((ROWS, HIDDEN), jnp.float32), np.ma.array([1, 2]),
    ]  # fmt: skip
    foreign = [
        smfree.EpConfig(**SIZES), plan.Machine(), plan.Routing(4, 2), ep_mesh(1),
        Mesh(np.array(jax.devices()[:1]), ("other",)),
        nn.init_moe(key, hidden=4, num_experts=2, expert_width=3),
        nn.init_mlp(key, 4, 3, dtype=jnp.float32),
        nn.ReferenceGroup("ep", smfree.EpConfig(**SIZES)).token(),
    ]  # fmt: skip
    return [*numbers, *others, *arrays, *foreign]


FUNCTIONS = ("fn", "grouped_matmul", "program", "activation", "experts", "shared")
"""Arguments that are called."""


def refusal(error):
    """Why ``error`` is none on purpose; the empty string if it is."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error)
    if not isinstance(error, (smfree.SmfreeError, TypeError, ValueError)):
        return "is of another type"
    if not frame.filename.startswith(PACKAGE) or not (frame.line or "").startswith("raise"):
        return f"was raised by {frame.filename}:{frame.lineno}: {frame.line}"
    says = isinstance(error, smfree.SmfreeError) or ("got" in text and "expected" in text)
    if not says or len(text) > 1500:
        return "does not say what was got and what was expected"
    return ""


def assert_all_refused(call, good):
    """``call(**good)`` is right, and with one argument replaced refused or right."""
    call(**good)
    wrong, refused, others = [], 0, values()
    for name in good:
        for value in others:
            if name in FUNCTIONS and callable(value):
                continue  # what it raises is its own
            try:
                call(**{**good, name: value})
            except Exception as error:
                refused += 1
                if why := refusal(error):
                    given = " ".join(f"{name}={value!r:.60}".split())
                    wrong.append(f"{given}: {type(error).__name__} {why}: {error!s:.200}")
    assert not wrong, f"{len(wrong)} of {refused}:\n" + "\n".join(wrong[:12])
    assert refused > len(others) / 4, "hardly anything is refused"


@pytest.fixture(autouse=True)
def whole_tracebacks():
    """JAX would take its own frames out, and ours seem to be the last ones."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


@pytest.fixture(scope="module")
def group():
    config = smfree.EpConfig(**SIZES, dtype=jnp.float32, num_lanes=2)
    with smfree.EpGroup.create(ep_mesh(as_many(2)), config=config) as group:
        yield group


@functools.cache
def params():
    sizes = {"hidden": HIDDEN, "num_experts": EXPERTS, "expert_width": WIDTH}
    return nn.init_moe(jax.random.key(0), **sizes, shared_width=WIDTH)


OPTIONS = {"router": nn.RouterConfig(TOP_K), "experts": nn.grouped_mlp, "shared": nn.mlp,
           "weight_on": "input", "grouped_matmul": nn.grouped_matmul,
           "implementation": "smfree"}  # fmt: skip


def x():
    return jnp.ones((ROWS, HIDDEN))


def idx():
    return jnp.tile(jnp.arange(TOP_K, dtype=jnp.int32), (ROWS, 1))


def weights():
    return jnp.ones((ROWS, TOP_K))


# ---- outside of shard_map ------------------------------------------------------------------------

CONFIG = {**SIZES, "dtype": jnp.float32, "recv_capacity": 8, "wire_capacity": 8,
          "expert_alignment": 4, "layout": "padded", "num_lanes": 2, "ranks_per_node": 2,
          "mode": None, "timeout_s": 1.0, "overflow": "drop", "sm_push_bytes": 0, "puts": "host",
          "differentiable": True}  # fmt: skip
RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results/gpu-nvidia-h200-x2.json"
COMPILED = jax.jit(lambda x: x + 1)
PLAIN = {
    "EpConfig": (smfree.EpConfig, lambda: CONFIG),
    "num_recv_rows": (
        smfree.EpConfig(**SIZES).num_recv_rows, lambda: {"num_tokens": 4, "num_ranks": 2},
    ),
    "recv_shape": (
        smfree.EpConfig(**SIZES, layout="padded").recv_shape,
        lambda: {"num_tokens": 4, "num_ranks": 2},
    ),
    "num_wire_rows": (
        smfree.EpConfig(**SIZES).num_wire_rows, lambda: {"num_tokens": 4, "num_ranks": 2},
    ),
    "rdma_size_hint": (
        smfree.rdma_size_hint, lambda: {"config": smfree.EpConfig(**SIZES), "num_ranks": 2},
    ),
    "nvl_size_hint": (
        smfree.nvl_size_hint, lambda: {"config": smfree.EpConfig(**SIZES), "num_ranks": 2},
    ),
    "route": (
        nn.route,
        lambda: {"x": x(), "weight": jnp.ones((HIDDEN, EXPERTS)),
                 "config": nn.RouterConfig(2), "bias": jnp.ones(EXPERTS),
                 "balance_bias": jnp.ones(EXPERTS), "mask": jnp.ones(ROWS, bool)},
    ),
    "RouterConfig": (
        nn.RouterConfig,
        lambda: {"top_k": 2, "score": "sigmoid", "normalise": True, "epsilon": 1e-20,
                 "scale": 2.5, "num_groups": 2, "groups_kept": 1, "group_score": "top2",
                 "softmax": "before"},
    ),
    "balanced_routes": (
        nn.balanced_routes,
        lambda: {"num_tokens": ROWS, "num_experts": EXPERTS, "top_k": TOP_K},
    ),
    "expert_load": (nn.expert_load, lambda: {"topk_idx": idx(), "num_experts": EXPERTS}),
    "load_balancing_loss": (
        nn.load_balancing_loss,
        lambda: {"routes": nn.balanced_routes(ROWS, EXPERTS, TOP_K), "sequences": 2,
                 "sequence_ids": jnp.zeros(ROWS, int), "axes": ()},
    ),
    "update_balance_bias": (
        nn.update_balance_bias,
        lambda: {"bias": jnp.ones(EXPERTS), "load": jnp.ones(EXPERTS, int), "rate": 0.1},
    ),
    "router_z_loss": (
        nn.router_z_loss,
        lambda: {"routes": nn.balanced_routes(ROWS, EXPERTS, TOP_K), "axes": ()},
    ),
    "quantile_balance_bias": (
        nn.quantile_balance_bias,
        lambda: {"bias": jnp.zeros(EXPERTS), "routes": nn.balanced_routes(ROWS, EXPERTS, TOP_K),
                 "config": nn.RouterConfig(TOP_K), "axes": ()},
    ),
    "load_metrics": (nn.load_metrics, lambda: {"load": jnp.ones(EXPERTS, int)}),
    "ExpertPlacement": (nn.ExpertPlacement, lambda: {"logical_of_physical": (0, 1, 0)}),
    "plan_placement": (
        nn.plan_placement,
        lambda: {"load": jnp.ones(EXPERTS, int), "num_physical": 12, "num_ranks": 4,
                 "num_nodes": 2, "num_groups": 4},
    ),
    "move_parameters": (
        nn.move_parameters,
        lambda: {"params": params().experts, "old": nn.ExpertPlacement(tuple(range(EXPERTS))),
                 "new": nn.ExpertPlacement((0, *range(EXPERTS)))},
    ),
    "spread": (
        nn.spread,
        lambda: {"routes": nn.balanced_routes(ROWS, EXPERTS, TOP_K),
                 "placement": nn.ExpertPlacement(tuple(range(EXPERTS))), "rank": 1},
    ),
    "mlp": (nn.mlp, lambda: {"x": x(), "params": params().shared, "activation": nn.swiglu}),
    "sigmoid_gated_mlp": (
        nn.sigmoid_gated_mlp,
        lambda: {"x": x(), "params": nn.SigmoidGatedParams(jnp.ones(HIDDEN), params().shared)},
    ),
    "local_expert": (
        nn.local_expert, lambda: {"group_sizes": jnp.ones(2, jnp.int32), "num_rows": 3},
    ),
    "grouped_mlp": (
        nn.grouped_mlp,
        lambda: {"x": x(), "group_sizes": jnp.zeros(EXPERTS, jnp.int32),
                 "local_expert": jnp.zeros(ROWS, jnp.int32), "params": params().experts,
                 "activation": nn.swiglu, "grouped_matmul": nn.grouped_matmul},
    ),
    "grouped_matmul": (
        nn.grouped_matmul,
        lambda: {"x": x(), "w": jnp.ones((2, HIDDEN, WIDTH)), "group_sizes": jnp.array([2, 2])},
    ),
    "block_matmul": (
        nn.block_matmul,
        lambda: {"x": x(), "w": jnp.ones((2, HIDDEN, WIDTH)), "group_sizes": jnp.array([2, 2]),
                 "block_rows": 2},
    ),
    "init_mlp": (
        nn.init_mlp,
        lambda: {"key": jax.random.key(0), "hidden": 4, "width": 2, "leading": (2,),
                 "gated": False, "biases": True, "dtype": jnp.float32},
    ),
    "init_moe": (
        nn.init_moe,
        lambda: {"key": jax.random.key(0), "hidden": 4, "num_experts": 2, "expert_width": 2,
                 "shared_width": 2, "shared_gate": True, "gated": True, "biases": True,
                 "dtype": jnp.float32},
    ),
    "moe_specs": (
        nn.moe_specs,
        lambda: {"params": params(), "axis": "ep", "fsdp_axis": "data", "tensor_axis": "tensor"},
    ),
    "ReferenceGroup": (
        nn.ReferenceGroup, lambda: {"axis": "ep", "config": smfree.EpConfig(**SIZES)},
    ),
    "Machine": (
        plan.Machine,
        lambda: {"nvlink_gb_s": 1.0, "network_gb_s": 1.0, "hbm_gb_s": 1.0, "matmul_tflop_s": 1.0,
                 "phases": plan.Machine().phases},
    ),
    "Machine.from_results": (
        plan.Machine.from_results,
        lambda: {"results": json.loads(RESULTS.read_text()), "hbm_gb_s": 1.0},
    ),
    "parts of Machine.from_results": (
        lambda **results: plan.Machine.from_results(results),
        lambda: json.loads(RESULTS.read_text()),
    ),
    "PhaseCost": (plan.PhaseCost, lambda: {"fixed_us": 1.0, "efficiency": 1.0}),
    "Routing": (
        plan.Routing, lambda: {"num_experts": 4, "top_k": 1, "sample": np.array([[0], [3]])},
    ),
    "Routing.row_shares": (plan.Routing(4, 1).row_shares, lambda: {"owners": 2}),
    "Routing.copy_shares": (plan.Routing(4, 1).copy_shares, lambda: {"owners": 2}),
    "predict": (
        plan.predict,
        lambda: {"config": smfree.EpConfig(**SIZES), "num_ranks": 2, "machine": plan.Machine(),
                 "routing": plan.Routing(EXPERTS, TOP_K)},
    ),
    "sweep": (
        plan.sweep,
        lambda: {"config": smfree.EpConfig(**SIZES), "ranks": [2, 4], "machine": plan.Machine(),
                 "routing": plan.Routing(EXPERTS, TOP_K)},
    ),
    "overlap_report": (
        smfree.overlap_report, lambda: {"program": COMPILED.lower(1.0).compile()},
    ),
    "overlap": (inspect.overlap, lambda: {"program": COMPILED.lower(1.0).compile()}),
    "orphans": (inspect.orphans, lambda: {"program": COMPILED.lower(1.0).compile()}),
    "Timeline": (
        inspect.Timeline,
        lambda: {"phases": [{"rank": 0, "phase": "dispatch_send", "begin_ns": 1, "end_ns": 3}],
                 "wire": [{"rank": 0, "peer": 1, "begin_ns": 1, "end_ns": 3}]},
    ),
    "launch": (
        functools.partial(testing.launch, processes=1, devices_per_process=1),
        lambda: {"program": ["-c", "pass"], "args": ["1"], "timeout_s": 60.0, "survivors_s": 1.0,
                 "env": {}, "platform": "cpu", "cwd": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_functions(name):
    call, good = PLAIN[name]
    assert_all_refused(call, good())


# ---- of a group ----------------------------------------------------------------------------------


def test_create():
    def create(**given):
        smfree.EpGroup.create(**given).close()

    good = {"mesh": ep_mesh(1), "axis": "ep", "config": smfree.EpConfig(**SIZES)}
    assert_all_refused(create, good)


def test_methods(group):
    def pause(timeout_s):
        with group.pause(timeout_s):
            pass

    assert_all_refused(group.token, {"lane": 1})
    assert_all_refused(pause, {"timeout_s": 1.0})


def test_close():
    config = smfree.EpConfig(**SIZES)

    def close(timeout_s):
        with smfree.EpGroup.create(ep_mesh(1), config=config) as group:
            group.close(timeout_s)

    assert_all_refused(close, {"timeout_s": 1.0})


@pytest.mark.cpu_only
def test_chaos(group):
    def shaken(**given):
        with testing.chaos(**given):
            pass

    assert_all_refused(
        shaken,
        {"group": group, "seed": 1, "max_delay_us": 1, "reorder": True, "stall_probability": 0.1,
         "stall_ms": 1},
    )  # fmt: skip


def test_on_global_arrays(group):
    key = jax.random.key(0)

    def layer(**given):
        jax.eval_shape(functools.partial(nn.moe_layer_on_mesh, **given))

    rows = jnp.ones((ROWS * group.num_ranks, HIDDEN))
    assert_all_refused(
        layer,
        {"group": group, "params": params(), "x": rows, "balance_bias": jnp.zeros(EXPERTS),
         "mask": jnp.ones(len(rows), bool), "params_spec": nn.moe_specs(params(), "ep"),
         "tensor_axis": (), **OPTIONS},
    )  # fmt: skip
    assert_all_refused(
        nn.init_moe_on_mesh,
        {"key": key, "group": group, "expert_width": WIDTH, "shared_width": WIDTH},
    )
    assert_all_refused(nn.init_balance_bias_on_mesh, {"group": group})


def test_outside_of_shard_map(group):
    """Right arguments at the wrong place."""
    token = group.token()
    calls = [
        lambda: smfree.dispatch_send(token, x(), idx(), weights()),
        lambda: smfree.dispatch_recv(token),
        lambda: smfree.combine_recv(token),
        lambda: nn.moe_layer(token, params(), x()),
        lambda: nn.moe_layer(token, params(), x(), implementation="reference"),
        lambda: nn.moe_two_batches((token, group.token(1)), params(), (x(), x())),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"shard_map|expected one that") as caught:
            call()
        assert not refusal(caught.value)


# ---- inside of shard_map: traced, not run --------------------------------------------------------


def dispatched(group, token):
    return smfree.dispatch(token, x(), idx(), weights())


def good_operations(group):
    """By name, each operation and its operands, which need a ``shard_map``."""
    token = group.token()
    sent = {"x": x(), "topk_idx": idx(), "topk_weights": weights()}
    d, ready = dispatched(group, group.token())
    in_flight = smfree.dispatch_send(group.token(), **sent)
    combining = smfree.combine_send(ready, d, d.x)
    other, again = dispatched(group, group.token(1))
    combined = {"token": again, "d": other, "y": other.x, "weights": other.weights}
    here = jax.tree.map(lambda a: a[: EXPERTS // group.num_ranks], params().experts)
    local = nn.MoeParams(params().router, here, params().shared)
    layer = {"params": local, "balance_bias": jnp.zeros(EXPERTS), **OPTIONS}
    routes = nn.balanced_routes(ROWS, EXPERTS, TOP_K)
    recorded = {"token": token, "x": x(), "params": local, "routes": routes}
    return {
        "dispatch_send": (smfree.dispatch_send, {"token": token, **sent}),
        "dispatch": (smfree.dispatch, {"token": token, **sent, "return_recv_hook": True}),
        "dispatch_recv": (smfree.dispatch_recv, {"token": in_flight}),
        "combine_send": (smfree.combine_send, combined),
        "combine": (smfree.combine, {**combined, "return_recv_hook": False}),
        "combine_recv": (smfree.combine_recv, {"token": combining}),
        "overlap": (
            lambda token, fn, x: smfree.overlap(token, fn, x),
            {"token": in_flight, "fn": lambda x: x, "x": x()},
        ),
        "tie": (lambda token, x: smfree.tie(token, x), {"token": token, "x": x()}),
        "hook.overlap": (
            lambda fn, x: smfree.dispatch(token, **sent, return_recv_hook=True).overlap(fn, x),
            {"fn": lambda x: x, "x": x()},
        ),
        "moe_layer": (
            nn.moe_layer, {"token": token, "x": x(), "mask": jnp.ones(ROWS, bool), **layer},
        ),
        "moe_layer with routes": (nn.moe_layer, recorded),
        "moe_two_batches": (
            nn.moe_two_batches, {"tokens": (token, group.token(1)), "xs": (x(), x()), **layer},
        ),
    }  # fmt: skip


OPERATIONS = (
    "dispatch_send", "dispatch", "dispatch_recv", "combine_send", "combine", "combine_recv",
    "overlap", "tie", "hook.overlap", "moe_layer", "moe_layer with routes", "moe_two_batches",
)  # fmt: skip


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(group, name, check_vma):
    def body():
        call, good = good_operations(group)[name]
        if name in ("dispatch_recv", "combine_recv"):  # a token is received once
            token, good = good["token"], {}
            call(token)
            call = functools.partial(lambda token, recv=call: recv(token))
            with pytest.raises(ValueError, match="received already"):
                call(token)
            for value in values():
                with pytest.raises(TypeError) as caught:
                    call(value)
                assert not refusal(caught.value), refusal(caught.value)
        else:
            assert_all_refused(call, good)
        return jnp.zeros(())

    jax.eval_shape(
        jax.shard_map(
            body, mesh=group.mesh, in_specs=(), out_specs=P(), check_vma=check_vma
        )
    )  # fmt: skip
