# SPDX-License-Identifier: Apache-2.0
"""Rows of several arrays, dtypes and widths, quantised or not, on both backends: to the bit.

But for the gradients of weights, sums over the rows whose order is open.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_smfree as smfree
import oracle
from property.expectations import assert_handle, assert_within
from property.leaves import Inputs, Kind, Program, random_inputs, route
from property.round_trip import Shape
from property.strategies import examples, routings
from support import portable

E4M3, E5M2 = smfree.Fp8(block=32), smfree.Fp8(block=64, dtype=jnp.float8_e5m2)
MX = smfree.Fp8(block=32, power_of_two=True)
QUANTISED = ("float32", "bfloat16", "float16")

KINDS = [
    Kind(
        Shape(4, 8, 3, 6, 64, "float32", alignment=2, capacity=20),
        (("x", (5,), "float32"), ("id", (), "int32"), ("mask", (3, 1), "bool")),
        (("y", (2, 3), "bfloat16"), ("z", (), "float32")),
    ),
    Kind(
        Shape(4, 8, 2, 5, 64, "float32", overflow="error"),
        (("x", (33,), "bfloat16"), ("small", (7,), "int8"), ("u", (2,), "uint16")),
        (("y", (9,), "float16"),),
    ),
    Kind(
        Shape(3, 9, 3, 5, 256, "bfloat16"),
        (("x", (64,), "bfloat16"), ("id", (2,), "uint32")),
        (("y", (128,), "bfloat16"),),
        E4M3,
        E5M2,
    ),
    Kind(
        Shape(4, 8, 4, 6, 128, "float32", capacity=14, wire=9, unused_tokens=2),
        (("x", (2, 32), "float16"), ("scale", (3,), "float8_e4m3fn")),
        (("y", (64,), "float32"), ("z", (4,), "float8_e5m2")),
        MX,
        E4M3,
    ),
    Kind(
        Shape(4, 8, 3, 6, 128, "float32", wire=11, overflow="error"),
        (("x", (32,), "float32"), ("id", (), "int16")),
        (("y", (32,), "bfloat16"),),
        E4M3,
    ),
    Kind(
        Shape(4, 8, 3, 6, 128, "float32", wire=13, capacity=16, ranks_per_node=2),
        (("x", (32,), "float32"), ("id", (3,), "uint8")),
        (("y", (64,), "bfloat16"), ("z", (3,), "float8_e5m2")),
        None,
        MX,
    ),
    Kind(
        Shape(4, 8, 4, 5, 128, "float32", ranks_per_node=2),
        (("x", (64,), "bfloat16"),),
        (("y", (64,), "bfloat16"),),
        E5M2,
        None,
    ),
    Kind(
        Shape(4, 8, 3, 6, 64, "float32", alignment=2, capacity=24, layout="padded"),
        (("x", (5,), "float32"), ("id", (), "int32"), ("mask", (3, 1), "bool")),
        (("y", (2, 3), "bfloat16"), ("z", (), "float32")),
    ),
    Kind(
        Shape(4, 8, 3, 6, 128, "float32", capacity=8, wire=13, overflow="error", layout="padded"),
        (("x", (32,), "float32"), ("id", (), "int16")),
        (("y", (32,), "bfloat16"),),
        E4M3,
    ),
    Kind(
        Shape(4, 8, 3, 6, 128, "float32", alignment=3, ranks_per_node=2, layout="padded"),
        (("x", (32,), "bfloat16"), ("id", (3,), "uint8")),
        (("y", (64,), "bfloat16"), ("z", (3,), "float8_e5m2")),
        None,
        MX,
    ),
    Kind(Shape(2, 4, 2, 4, 8, "float32"), (("id", (), "int32"),), (("y", (), "float32"),)),
]


@pytest.fixture(scope="module")
def program(request):
    kind, backend = request.param
    if kind.shape.ranks_per_node and jax.default_backend() != "cpu":
        pytest.skip("nodes are made up on the CPU only")
    with portable() if backend == "portable" else contextlib.nullcontext():
        program = Program(kind)
    with program.group:
        yield program


@pytest.mark.parametrize(
    "program",
    [
        pytest.param((kind, backend), id=f"{kind}-{backend}")
        for kind in KINDS
        for backend in ("native", "portable")
    ],
    indirect=True,
)
@examples(15)
@given(data=st.data())
def test_leaves(program, data):
    draw_and_check(program, data)


FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
OTHERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "bool")


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    """Up to four arrays each way, of any dtypes and widths; whole blocks where they are needed."""
    wires = st.sampled_from([None, None, E4M3, E5M2, MX])
    wire, grad_wire = draw(wires), draw(wires)
    block = max([w.block for w in (wire, grad_wire) if w] or [0])

    def arrays(dtypes: tuple[str, ...]) -> tuple:
        drawn = draw(st.lists(st.sampled_from(dtypes), min_size=1, max_size=4))
        found = []
        for number, dtype in enumerate(drawn):
            width = draw(st.integers(1, 40))
            if dtype in QUANTISED and block:
                width = block * draw(st.integers(1, 2))
            shape = draw(st.sampled_from([(width,), (1, width), (width, 1)]))
            found.append((f"a{number}", shape, dtype))
        return tuple(found)

    shape = Shape(
        2, 8, draw(st.integers(1, 4)), draw(st.integers(1, 6)), 600, "float32",
        alignment=draw(st.integers(1, 3)), overflow=draw(st.sampled_from(["error", "drop"])),
        wire=draw(st.sampled_from([None, 5])), layout=draw(st.sampled_from(["grouped", "padded"])),
    )  # fmt: skip
    return Kind(shape, arrays((*FLOATS, *OTHERS)), arrays(FLOATS), wire, grad_wire)


@pytest.mark.parametrize("backend", ["native", "portable"])
@examples(4)
@given(data=st.data())
def test_any_kind(backend, data):
    """Each example is a program of its own."""
    with portable() if backend == "portable" else contextlib.nullcontext():
        program = Program(data.draw(kinds()))
    with program.group:
        for _ in range(3):
            draw_and_check(program, data)


def draw_and_check(program: Program, data: st.DataObject) -> None:
    kind, num_rows = program.kind, program.num_rows
    capacity = data.draw(
        st.lists(
            st.sampled_from([num_rows, num_rows + 1, num_rows // 2, 3, 0, -1]),
            min_size=kind.shape.ranks, max_size=kind.shape.ranks,
        )
    )  # fmt: skip
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    topk_idx = data.draw(routings(kind.shape))
    inputs = random_inputs(rng, kind, num_rows, topk_idx, np.array(capacity, np.int32))
    actual, routing = program(inputs), route(kind, inputs)
    check(kind, inputs, actual, routing)
    if kind.shape.overflow == "error" and routing.num_dropped.any():
        with pytest.raises(smfree.SmfreeError, match=r"exceed .*capacity"):
            program.group.check()
    program.group.check()


def check(kind: Kind, inputs: Inputs, actual: dict, routing: oracle.Routing) -> None:
    shape, d = kind.shape, actual["d"]
    is_error = shape.overflow == "error"
    overflowed = is_error & (routing.num_dropped > 0)
    weights = oracle.dispatch(routing, inputs.topk_weights, inputs.topk_weights)[1]
    weights = weights.astype(np.float32)

    np.testing.assert_array_equal(d.handle.group_sizes, routing.group_sizes)
    np.testing.assert_array_equal(d.handle.num_rows, routing.row_counts)
    np.testing.assert_array_equal(d.handle.num_dropped[:, 0], routing.num_dropped)
    assert_handle(shape, inputs.topk_idx, d.handle, routing)
    nobody, in_groups = shape.experts // shape.ranks, routing.in_groups
    of_groups = [np.repeat(np.arange(len(s)), s) for s in routing.group_sizes]
    for experts, expected in zip(actual["local_expert"], of_groups, strict=True):
        np.testing.assert_array_equal(experts[experts < nobody], expected)
        assert (experts <= nobody).all()
    if shape.layout == "padded":
        np.testing.assert_array_equal(actual["local_expert"] < nobody, in_groups)
    else:
        assert (np.diff(actual["local_expert"]) >= 0).all()

    # What is past a padded group is said to be nothing, but on a rank whose results are NaN.
    defined = in_groups | np.broadcast_to(overflowed, (shape.ranks,))[:, None]
    for name, x in inputs.x.items():
        expected = received(routing, arrived(x, kind.wire).astype(x.dtype))
        same(actual["again"].x[name], expected, f"again {name}", in_groups)
        same(actual["alone"].x[name], expected, f"alone {name}", in_groups)
        expected[overflowed] = poison(x.dtype)
        same(d.x[name], expected, name, defined)
    same(actual["again"].weights, weights, "weights sent again", in_groups)
    ones = oracle.dispatch(routing, inputs.topk_weights, np.ones_like(inputs.topk_weights))[1]
    same(actual["alone"].weights, ones.astype(np.float32), "weights of none", in_groups)
    weights[overflowed] = np.nan
    same(d.weights, weights, "weights", defined)

    for name, y in inputs.y.items():
        out = combined(kind, inputs, routing, y, weights, kind.wire, inputs.add[name])
        same(actual["out"][name], out, f"combined {name}")
        same(actual["add_ct"][name], inputs.out_ct[name], f"gradient of add {name}")
    if overflowed.any():
        return  # no gradient is near to a NaN

    ones = np.ones_like(weights)
    for name, received_ct in inputs.received_ct.items():
        x_ct = combined(kind, inputs, routing, received_ct, ones, kind.grad_wire, None)
        same(actual["x_ct"][name], x_ct, f"gradient of {name}")
    products = magnitudes = np.zeros(weights.shape)
    for name, y in inputs.y.items():
        out_ct = inputs.out_ct[name]
        back = received(routing, arrived(out_ct, kind.grad_wire).astype(out_ct.dtype))
        back = back.astype(np.float32)
        weighted = back * weights.reshape(*weights.shape, *[1] * (back.ndim - 2))
        same(actual["y_ct"][name], weighted.astype(y.dtype), f"gradient of {name}", in_groups)
        terms = flat(y.astype(np.float64) * back)
        products, magnitudes = products + terms.sum(-1), magnitudes + np.abs(terms).sum(-1)
    expected, bound = (
        oracle.dispatch_grad(routing, np.zeros((*v.shape, 1)), v)[1] for v in (products, magnitudes)
    )
    width = sum(flat(y).shape[-1] for y in inputs.y.values())
    assert_within(
        actual["topk_weights_ct"], expected, bound * width * 2.0**-23, "gradient of topk_weights"
    )


def flat(rows: np.ndarray) -> np.ndarray:
    """[R, *, ...] as [R, *, W]."""
    return rows.reshape(*rows.shape[:2], -1)


def arrived(rows: np.ndarray, wire: smfree.Fp8 | None) -> np.ndarray:
    """What comes of rows that travel, in float32 where they are quantised."""
    if wire is None or rows.dtype.name not in QUANTISED:
        return rows.copy()
    quantised = oracle.quantise(flat(rows), wire.block, wire.dtype, wire.power_of_two)
    return oracle.dequantise(*quantised).reshape(rows.shape)


def received(routing: oracle.Routing, rows: np.ndarray) -> np.ndarray:
    """[R, T, ...] -> [R, N, ...], zero where there is none."""
    result = np.zeros((len(rows), routing.num_rows, *rows.shape[2:]), rows.dtype)
    receiver, source, position, _, row = routing.copies.T
    result[receiver, row] = rows[source, position]
    return result


def combined(
    kind: Kind, inputs: Inputs, routing: oracle.Routing, y: np.ndarray, weights: np.ndarray,
    wire: smfree.Fp8 | None, add: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """In float32, in the documented order, rounded where rows travel and at the end."""
    shape, dtype, trailing = kind.shape, y.dtype, y.shape[2:]
    rows_sent = inputs.topk_idx.shape[1]

    def on_wire(sums):
        if dtype.name not in QUANTISED:
            return sums.astype(dtype).astype(np.float32)
        return arrived(sums if wire else sums.astype(dtype), wire).astype(np.float32)

    y, per_sum = flat(y).astype(np.float32), shape.ranks_per_sum
    out = np.zeros((shape.ranks, rows_sent, y.shape[-1]), np.float32)
    for first in range(0, shape.ranks, per_sum):
        of_node = np.zeros_like(out)
        for receiver in range(first, first + per_sum):
            partial = np.zeros_like(out)
            for slot in range(shape.top_k):
                rows = routing.rows[receiver, :, :, slot]
                products = y[receiver, rows] * weights[receiver, rows, None]
                partial += np.where((rows >= 0)[..., None], products, np.float32(0))
            of_node += on_wire(partial)
        out += on_wire(of_node) if per_sum > 1 else of_node
    if add is not None:
        out += flat(add).astype(np.float32)
    out = out.astype(dtype)
    if shape.overflow == "error":
        out[routing.lost] = np.nan
    alone = 0 if add is None else flat(add)
    out = np.where((inputs.topk_idx < 0).all(axis=-1)[..., None], alone, out).astype(dtype)
    return out.reshape(*out.shape[:2], *trailing)


def poison(dtype: np.dtype) -> object:
    """All bits set."""
    if dtype.kind == "b":
        return True
    return np.nan if jnp.issubdtype(dtype, jnp.floating) else np.array(-1).astype(dtype)


def same(actual: np.ndarray, expected: np.ndarray, what: str, where: Any = ...) -> None:
    """Every bit, but that one NaN is as good as another one and a zero has no sign."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    actual, expected = actual[where], expected[where]
    np.testing.assert_array_equal(actual.astype(np.float64), expected.astype(np.float64), what)
