# SPDX-License-Identifier: Apache-2.0
"""What the oracle says of a round trip, and how far rounding may lead away from it."""

import jax
import jax.numpy as jnp
import numpy as np

import oracle
from property.round_trip import Inputs, Outputs, Shape

_BITS = {2: np.uint16, 4: np.uint32}


def bits(values: np.ndarray) -> np.ndarray:
    """The values as unsigned integers, so that -0.0 and NaNs count too."""
    values = np.asarray(values)
    return values if values.dtype.kind in "iu" else values.view(_BITS[values.dtype.itemsize])


def assert_same_bits(actual, expected) -> None:
    """Of two pytrees of arrays."""
    for (path, a), (_, e) in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves_with_path(expected), strict=True
    ):
        np.testing.assert_array_equal(bits(a), bits(e), err_msg=jax.tree_util.keystr(path))


def assert_dispatched(shape: Shape, inputs: Inputs, d, routing: oracle.Routing) -> None:
    """Rows, order, weights, sizes, counts and the zero tail, bit for bit; the handle too."""
    rows, weights = oracle.dispatch(routing, bits(inputs.x), bits(inputs.topk_weights))
    np.testing.assert_array_equal(bits(d.x), rows)
    np.testing.assert_array_equal(bits(d.weights), weights)
    np.testing.assert_array_equal(d.group_sizes, routing.group_sizes)
    np.testing.assert_array_equal(d.num_dropped[:, 0], routing.num_dropped)
    assert_handle(shape, inputs.topk_idx, d.handle, routing)


def assert_handle(shape: Shape, topk_idx: np.ndarray, handle, routing: oracle.Routing) -> None:
    rank_of_slot = np.where(topk_idx < 0, -1, topk_idx // (shape.experts // shape.ranks))
    places = np.full((shape.ranks, shape.tokens, shape.places), -1)
    filled = np.zeros((shape.ranks, shape.tokens), int)
    received: list[list[np.ndarray]] = [[] for _ in range(shape.ranks)]
    for source in range(shape.ranks):
        for to in range(shape.ranks):
            sent = np.flatnonzero((rank_of_slot[source] == to).any(axis=1))
            assert handle.send_counts[source, to] == len(sent)
            places[source, sent, filled[source, sent]] = to * shape.tokens + np.arange(len(sent))
            filled[source, sent] += 1
            received[to].extend(routing.rows[to, source, sent[: routing.recv_counts[to, source]]])
    np.testing.assert_array_equal(handle.places, places)
    np.testing.assert_array_equal(handle.recv_counts, routing.recv_counts)
    for rows, expected in zip(handle.rows, received, strict=True):
        np.testing.assert_array_equal(rows[: len(expected)].ravel(), np.ravel(expected))
        assert (rows[len(expected) :] == -1).all()


def assert_within(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray, what: str) -> None:
    error = np.abs(np.asarray(actual, np.float64) - expected)
    wrong = ~(error <= bound)  # a NaN is wrong
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {wrong.size} values are wrong, first at "
        f"{np.argwhere(wrong)[0]}: got {np.asarray(actual, np.float64)[wrong][0]!r}, expected "
        f"{expected[wrong][0]!r} +- {np.broadcast_to(bound, wrong.shape)[wrong][0]:.3g}"
    )


def assert_rounded(shape: Shape, inputs: Inputs, actual: Outputs, routing: oracle.Routing) -> None:
    """The combines and all gradients, each within the roundings that its definition contains.

    A sum of m float32 products p_i that is rounded to the dtype r times is off by at most
    ((1 + u)^r (1 + v)^m - 1) sum|p_i|, with u, v half an ulp of 1 in the dtype and in float32; u is
    0 if the dtype is float32. The sum is the oracle once more, of absolute values. Below the normal
    numbers an error is absolute.
    """
    dtype = jnp.finfo(shape.dtype)
    u = 0.0 if shape.dtype == "float32" else float(dtype.eps) / 2
    v = float(jnp.finfo(jnp.float32).eps) / 2
    # Of one rank by ascending slot, then of all ranks, or of those of a node and of all nodes.
    terms = shape.top_k + 2 * shape.places
    sums = 2 if shape.ranks_per_sum == 1 else 3

    def bound(magnitude, roundings, float32_roundings):
        relative = (1 + u) ** roundings * (1 + v) ** float32_roundings - 1
        # Every rank's and node's partial sum is rounded, and the result.
        return relative * magnitude + (2 * shape.places + 1) * float(dtype.smallest_subnormal)

    def check(what, value, function, *operands, roundings, float32_roundings):
        magnitude = function(routing, *map(np.abs, operands))
        limit = bound(magnitude, roundings, float32_roundings)
        assert_within(value, function(routing, *operands), limit, what)

    def y_ct(*operands):
        return oracle.combine_grad(*operands)[0]

    def weights_ct(*operands):
        return oracle.combine_grad(*operands)[1]

    def x_ct(routing, received_ct):
        return oracle.dispatch_grad(routing, received_ct, inputs.received_weights_ct)[0]

    def topk_weights_ct(routing, direct, y, weights, out_ct):
        through_combine = oracle.combine_grad(routing, y, weights, out_ct)[1]
        return oracle.dispatch_grad(routing, inputs.received_ct, direct + through_combine)[1]

    ys, cts = _float64(inputs.ys), _float64(inputs.out_cts)
    dispatched = oracle.dispatch(routing, inputs.out_cts[0], inputs.topk_weights)[1]
    all_weights = (dispatched, _float64(inputs.weights), np.ones_like(dispatched))
    for i, weights in enumerate(all_weights):
        check(
            f"combine {i}", actual.outs[i], oracle.combine, ys[i], weights,
            roundings=sums, float32_roundings=terms,
        )  # fmt: skip
        check(
            f"gradient of y {i}", actual.y_cts[i], y_ct, ys[i], weights, cts[i],
            roundings=1, float32_roundings=1,
        )  # fmt: skip
    check(
        "gradient of weights", actual.weights_ct, weights_ct, ys[1], all_weights[1], cts[1],
        roundings=0, float32_roundings=shape.hidden + 1,
    )  # fmt: skip
    check(
        "gradient of x", actual.x_ct, x_ct, _float64(inputs.received_ct),
        roundings=sums, float32_roundings=terms,
    )  # fmt: skip
    check(
        "gradient of topk_weights", actual.topk_weights_ct, topk_weights_ct,
        _float64(inputs.received_weights_ct), ys[0], dispatched, cts[0],
        roundings=0, float32_roundings=shape.hidden + 2,
    )  # fmt: skip


def assert_summed_in_order(
    inputs: Inputs, actual: Outputs, routing: oracle.Routing, ranks_per_sum: int = 1
) -> None:
    """The same sums once more, in float32 and in the documented order: not a bit is left open.

    ``ranks_per_sum``: as in `Shape`.
    """

    def combined(y, weights):
        num_ranks, _, rows_sent, top_k = routing.rows.shape
        out = np.zeros((num_ranks, rows_sent, y.shape[-1]), np.float32)
        for first in range(0, num_ranks, ranks_per_sum):
            of_node = np.zeros_like(out)
            for receiver in range(first, first + ranks_per_sum):
                partial = np.zeros_like(out)
                for slot in range(top_k):
                    rows = routing.rows[receiver, :, :, slot]
                    products = y[receiver, rows].astype(np.float32) * weights[receiver, rows, None]
                    partial += np.where((rows >= 0)[..., None], products, np.float32(0))
                of_node += partial.astype(y.dtype).astype(np.float32)
            out += of_node.astype(y.dtype).astype(np.float32)
        return out.astype(y.dtype)

    def y_ct(weights, out_ct):
        result = np.zeros(inputs.ys[0].shape, out_ct.dtype)
        for receiver, source, position, _, row in routing.copies:
            product = weights[receiver, row] * out_ct[source, position].astype(np.float32)
            result[receiver, row] = product.astype(out_ct.dtype)
        return result

    ones = np.ones_like(inputs.weights)
    for i, weights in enumerate((np.asarray(actual.d.weights), inputs.weights, ones)):
        np.testing.assert_array_equal(actual.outs[i], combined(inputs.ys[i], weights))
        np.testing.assert_array_equal(actual.y_cts[i], y_ct(weights, inputs.out_cts[i]))
    np.testing.assert_array_equal(actual.x_ct, combined(inputs.received_ct, ones))


def _float64(values):
    return jax.tree.map(lambda v: np.asarray(v).astype(np.float64), values)
