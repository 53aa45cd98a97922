# SPDX-License-Identifier: Apache-2.0
"""What XLA schedules for eight H100 between every send and its recv. No GPU takes part."""

import dataclasses
import re
from collections import Counter

import jax
import pytest

from jax_smfree import inspect

pytestmark = pytest.mark.cpu_only

FORWARD, GRADIENT, REPLAY = "forward", "gradient", "replay"


@dataclasses.dataclass(frozen=True)
class Expected:
    """A window and the matmuls that it must contain, at least: those of one part of the model."""

    operation: str
    pass_: str
    matmuls: int
    of: str = ""
    lane: int = 0


LAYER_FORWARD = [
    Expected("dispatch", FORWARD, 2, "under_dispatch"),
    Expected("combine", FORWARD, 2, "under_combine"),
]
# The backward pass sends gradients of a combine's results as a dispatch, and the other way round.
# Four matmuls: the gradients of the two overlapped ones, by their inputs (dX) and weights (dW).
LAYER = [
    *LAYER_FORWARD,
    Expected("dispatch", GRADIENT, 4, "under_combine"),
    Expected("combine", GRADIENT, 4, "under_dispatch"),
]
HAS_KERNELS = jax.__version_info__ >= (0, 11)  # for grouped matmuls; else it is ragged_dot
EXPECTED = {
    "forward": LAYER_FORWARD,
    "gradient": LAYER,
    "scan": LAYER,
    "checkpoint": [
        *LAYER,
        Expected("dispatch", REPLAY, 2, "under_dispatch"),
        Expected("combine", REPLAY, 2, "under_combine"),
    ],
    "checkpoint_saving": LAYER,
    "two_lanes": [
        Expected("dispatch", FORWARD, 2, "under_dispatch", lane=0),
        Expected("dispatch", FORWARD, 2, "expert", lane=1),
        Expected("combine", FORWARD, 2, "expert", lane=0),
        Expected("combine", FORWARD, 2, "under_combine", lane=1),
        Expected("dispatch", GRADIENT, 4, "under_combine", lane=1),
        Expected("dispatch", GRADIENT, 4, "expert", lane=0),
        Expected("combine", GRADIENT, 4, "expert", lane=1),
        Expected("combine", GRADIENT, 4, "under_dispatch", lane=0),
    ],
    # XLA may merge matmuls that share an operand. The gradients of the three matrices of the routed
    # experts wait for the send of those of the rows.
    "nn_layer": [
        Expected("dispatch", FORWARD, 1),
        Expected("combine", FORWARD, 1),
        Expected("dispatch", GRADIENT, 2),
        Expected("combine", GRADIENT, 2 + (3 if HAS_KERNELS else 2)),
    ],
    "nn_without_shared": [
        Expected("dispatch", FORWARD, 0),
        Expected("combine", FORWARD, 0),
        Expected("dispatch", GRADIENT, 0),
        Expected("combine", GRADIENT, 3, "grouped_outer_product")
        if HAS_KERNELS
        else Expected("combine", GRADIENT, 2, "ragged_dot"),
    ],
    "nn_two_batches": [
        Expected(operation, pass_, matmuls, lane=lane)
        for operation in ("dispatch", "combine")
        for pass_, matmuls in ((FORWARD, 2), (GRADIENT, 4))
        for lane in (0, 1)
    ],
}


def key(operation: str, pass_: str, lane: int) -> str:
    return f"{operation} {pass_}, lane {lane}"


def pass_of(window: inspect.Window) -> str:
    if window.is_backward:
        return GRADIENT
    return REPLAY if window.is_replay else FORWARD


@pytest.mark.parametrize("latency_hiding", ["on", "off"])
@pytest.mark.parametrize("program", EXPECTED)
def test_work_between_every_send_and_its_recv(schedule_of, program, latency_hiding):
    text = schedule_of(program, latency_hiding)
    windows = inspect.overlap(text)
    expected = {key(e.operation, e.pass_, e.lane): e for e in EXPECTED[program]}

    assert {key(w.operation, pass_of(w), w.lane) for w in windows} == set(expected)
    for window in windows:
        e = expected[key(window.operation, pass_of(window), window.lane)]
        inside = [s for s in window.matmuls if e.of in s.op_name]
        assert len(inside) >= e.matmuls, f"{window}\n{inspect.overlap_report(text)}"


@pytest.mark.parametrize("latency_hiding", ["on", "off"])
@pytest.mark.parametrize("program", EXPECTED)
def test_every_send_is_received_once(schedule_of, program, latency_hiding):
    text = schedule_of(program, latency_hiding)
    assert inspect.orphans(text) == []
    # Counted without the reader: XLA has neither cloned nor dropped a call.
    calls = [
        len(re.findall(rf'custom_call_target="smfree_\w+_{phase}\w*"', text))
        for phase in ("send", "recv")
    ]
    assert calls == [len(EXPECTED[program])] * 2


@pytest.mark.parametrize("program", ["scan", "checkpoint", "checkpoint_saving"])
def test_windows_lie_inside_the_loops(schedule_of, program):
    windows = inspect.overlap(schedule_of(program, "on"))
    forward = {w.computation for w in windows if pass_of(w) == FORWARD}
    backward = {w.computation for w in windows if pass_of(w) != FORWARD}
    assert len(forward) == len(backward) == 1
    assert forward != backward


@pytest.mark.skipif(not HAS_KERNELS, reason="the kernels need JAX 0.11")
def test_the_gradient_of_rows_that_gate_and_up_share_is_one_matmul(schedule_of):
    text = schedule_of("nn_without_shared", "on")
    kernels = re.findall(r'target="mosaic_gpu.*op_name="[^"]*/(grouped_\w+)', text)
    assert Counter(kernels) == {
        "grouped_matmul": 3,
        "grouped_matmul_transposed": 2,
        "grouped_outer_product": 3,
    }


@pytest.mark.parametrize("latency_hiding", ["on", "off"])
def test_without_ties_xla_overlaps_nothing(schedule_of, latency_hiding):
    """The control: the work of the other programs lies in the windows because of `overlap`."""
    windows = inspect.overlap(schedule_of("untied", latency_hiding))
    assert [w.matmuls for w in windows] == [(), ()]
