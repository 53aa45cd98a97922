# SPDX-License-Identifier: Apache-2.0
"""The jnp reference against the NumPy oracle: values, gradients, padding, dropping."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import oracle
from jax_smfree._src import reference
from jax_smfree._src.config import EpConfig
from support import ep_mesh

NUM_RANKS = 4
AXIS = "ep"
P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Case:
    """One routing problem; -1 appears in its topk_idx."""

    num_experts: int = 8
    top_k: int = 2
    tokens: int = 6
    hidden: int = 16
    dtype: Any = jnp.float32
    recv_capacity: int | None = None
    wire_capacity: int | None = None
    alignment: int = 1
    ranks_per_node: int = 1  # of more: hierarchical
    overflow: str = "drop"
    layout: str = "grouped"
    seed: int = 0

    @property
    def config(self) -> EpConfig:
        return EpConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden=self.hidden,
            max_tokens=self.tokens,
            dtype=self.dtype,
            recv_capacity=self.recv_capacity,
            wire_capacity=self.wire_capacity,
            expert_alignment=self.alignment,
            overflow=self.overflow,  # type: ignore[arg-type]
            layout=self.layout,  # type: ignore[arg-type]
            mode=None if self.ranks_per_node == 1 else "hierarchical",
            ranks_per_node=self.ranks_per_node,
        )

    def inputs(self) -> tuple[Any, Any, Any]:
        rng = np.random.default_rng(self.seed)
        shape = (NUM_RANKS, self.tokens, self.top_k)
        idx = rng.permuted(np.tile(np.arange(self.num_experts), (*shape[:2], 1)), axis=-1)
        idx = np.where(rng.random(shape) < 0.2, -1, idx[..., : self.top_k]).astype(np.int32)
        x = rng.standard_normal((*shape[:2], self.hidden)).astype(self.dtype)
        return x, idx, rng.random(shape, np.float32)

    def routing(self) -> oracle.Routing:
        return oracle.route(
            self.inputs()[1],
            self.num_experts,
            recv_capacity=self.recv_capacity,
            wire_capacity=self.wire_capacity,
            alignment=self.alignment,
            layout=self.layout,
            ranks_per_node=self.ranks_per_node,
        )


CASES = [
    Case(),
    Case(num_experts=4, top_k=1, tokens=1),
    Case(num_experts=16, top_k=8, tokens=9, seed=1),
    Case(alignment=4, seed=2),
    Case(recv_capacity=7, seed=3),
    Case(recv_capacity=8, alignment=4, seed=4),
    Case(dtype=jnp.bfloat16, seed=5),
    Case(wire_capacity=6, top_k=3, seed=8),
    Case(wire_capacity=9, top_k=3, recv_capacity=12, alignment=2, seed=9),
    Case(wire_capacity=7, top_k=3, ranks_per_node=2, seed=10),
    Case(wire_capacity=13, top_k=4, recv_capacity=30, tokens=9, ranks_per_node=2, seed=11),
    Case(dtype=jnp.float16, top_k=5, tokens=12, recv_capacity=9, seed=6),
    Case(layout="padded", alignment=4, seed=10),
    Case(layout="padded", top_k=3, recv_capacity=12, alignment=2, wire_capacity=14, seed=11),
]


def per_rank(function: Any, *, check_vma: bool = True) -> Any:
    """Runs ``function`` on every rank; arrays have a leading rank axis outside."""
    mesh = ep_mesh(NUM_RANKS)

    def body(*args: Any) -> Any:
        out = function(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=check_vma
    )
    return jax.jit(mapped)


def dispatch(config: EpConfig, x: Any, idx: Any, weights: Any) -> reference.DispatchResult:
    return reference.dispatch(x, idx, weights, axis=AXIS, config=config)


def round_trip(config: EpConfig, x: Any, idx: Any, weights: Any, scale: Any) -> Any:
    """dispatch, a function of every row, combine."""
    d = dispatch(config, x, idx, weights)
    return reference.combine(d, d.x * scale.astype(d.x.dtype), d.weights)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch_is_bit_equal_to_the_oracle(case: Case) -> None:
    x, idx, weights = case.inputs()
    d = per_rank(functools.partial(dispatch, case.config))(x, idx, weights)
    routing = case.routing()
    expected_x, expected_weights = oracle.dispatch(routing, x, weights)
    np.testing.assert_array_equal(np.asarray(d.x, np.float64).reshape(expected_x.shape), expected_x)
    np.testing.assert_array_equal(d.weights.reshape(expected_weights.shape), expected_weights)
    np.testing.assert_array_equal(d.group_sizes, routing.group_sizes)
    np.testing.assert_array_equal(d.num_dropped[:, 0], routing.num_dropped)
    np.testing.assert_array_equal(d.handle.rows, routing.rows)
    if case.recv_capacity or case.wire_capacity:
        assert routing.num_dropped.any(), "the case was meant to drop"


@pytest.mark.parametrize(
    ("case", "check_vma"), [*((case, True) for case in CASES), (CASES[0], False)], ids=str
)
def test_combine_and_gradients_agree_with_the_oracle(case: Case, check_vma: bool) -> None:
    x, idx, topk_weights = case.inputs()
    routing = case.routing()
    rng = np.random.default_rng(100 + case.seed)
    y = rng.standard_normal((NUM_RANKS, routing.num_rows, case.hidden)).astype(case.dtype)
    out_ct = rng.standard_normal(x.shape).astype(case.dtype)
    x_ct = rng.standard_normal(y.shape).astype(case.dtype)
    weights_ct = rng.standard_normal(y.shape[:2]).astype(np.float32)

    def forward_and_backward(*args: Any) -> Any:
        x, idx, topk_weights, y, out_ct, x_ct, weights_ct = args

        def received(x: Any, topk_weights: Any) -> Any:
            d = dispatch(case.config, x, idx, topk_weights)
            return (d.x, d.weights), d

        def combined(y: Any, weights: Any) -> Any:
            return reference.combine(d, y.reshape(d.x.shape), weights.reshape(d.weights.shape))

        _, dispatch_vjp, d = jax.vjp(received, x, topk_weights, has_aux=True)
        weights = d.weights.reshape(-1)
        out, combine_vjp = jax.vjp(combined, y, weights)
        received_cts = x_ct.reshape(d.x.shape), weights_ct.reshape(d.weights.shape)
        return out, dispatch_vjp(received_cts), combine_vjp(out_ct), weights

    run = per_rank(forward_and_backward, check_vma=check_vma)
    out, dispatch_grads, combine_grads, weights = run(
        x, idx, topk_weights, y, out_ct, x_ct, weights_ct
    )
    expected = oracle.combine(routing, y, weights)
    assert out.dtype == case.dtype and dispatch_grads[0].dtype == case.dtype
    for got, want in [
        (out, expected),
        *zip(dispatch_grads, oracle.dispatch_grad(routing, x_ct, weights_ct), strict=True),
        *zip(combine_grads, oracle.combine_grad(routing, y, weights, out_ct), strict=True),
    ]:
        # Up to min(K, R) partial sums are rounded, and their sum once more.
        bound = float(jnp.finfo(got.dtype).eps) * np.abs(want).max() * 4
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=bound)


def test_weights_of_none_are_ones_and_a_plain_sum() -> None:
    case = Case()
    x, idx, _ = case.inputs()

    def body(x: Any, idx: Any) -> Any:
        d = reference.dispatch(x, idx, None, axis=AXIS, config=case.config)
        return d.weights, reference.combine(d, d.x, None)

    weights, out = per_rank(body)(x, idx)
    num_copies = (idx >= 0).sum(-1, keepdims=True)
    assert weights.sum() == num_copies.sum()
    np.testing.assert_allclose(out, x * num_copies, rtol=1e-6)


def test_overflow_as_an_error_poisons_the_receiver_only() -> None:
    case = Case(recv_capacity=7, overflow="error", seed=3)
    x, idx, weights = case.inputs()
    d = per_rank(functools.partial(dispatch, case.config))(x, idx, weights)
    overflowed = case.routing().num_dropped > 0
    assert overflowed.any() and not overflowed.all()
    np.testing.assert_array_equal(np.isnan(d.x).all(axis=(1, 2)), overflowed)
    np.testing.assert_array_equal(np.isnan(d.weights).any(axis=1), overflowed)


def test_two_phases_give_the_bits_of_one() -> None:
    case = Case(dtype=jnp.bfloat16, seed=7)
    x, idx, weights = case.inputs()
    scale = np.full((NUM_RANKS, 1), 1.5, np.float32)
    group = reference.Group(AXIS, case.config)

    def split(x: Any, idx: Any, weights: Any, scale: Any) -> Any:
        token = reference.dispatch_send(group.token(), x, idx, weights)
        token, scale = reference.overlap(token, jnp.copy, scale)
        d, token = reference.dispatch_recv(token)
        token = reference.combine_send(token, d, d.x * scale.astype(d.x.dtype))
        out, token = reference.combine_recv(token)
        assert token == group.token()
        return out

    whole = functools.partial(round_trip, case.config)
    operands = (x, idx, weights, scale)
    np.testing.assert_array_equal(per_rank(split)(*operands), per_rank(whole)(*operands))
