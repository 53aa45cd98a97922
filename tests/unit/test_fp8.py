# SPDX-License-Identifier: Apache-2.0
"""Quantisation in jnp against NumPy: every bit, and the edges of the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_smfree as smfree
import oracle
from jax_smfree._src import fp8

DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
WIRES = [
    smfree.Fp8(block, dtype, power_of_two)
    for block, dtype, power_of_two in [
        (32, DTYPES[0], False), (64, DTYPES[1], False), (128, DTYPES[0], True),
        (32, DTYPES[1], True),
    ]
]  # fmt: skip


def quantised(rows, wire):
    return jax.tree.map(np.asarray, jax.jit(lambda r: fp8.quantise(r, wire))(rows))


@pytest.mark.parametrize("dtype", fp8.QUANTISED, ids=str)
@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_bits(wire, dtype):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 256)) * 2.0 ** rng.integers(-12, 12, (500, 256))
    rows = rows.astype(dtype)
    values, scales = quantised(rows, wire)
    expected = oracle.quantise(rows, wire.block, wire.dtype, wire.power_of_two)
    np.testing.assert_array_equal(values.view(np.uint8), expected[0].view(np.uint8))
    np.testing.assert_array_equal(scales, expected[1])
    again = jax.jit(fp8.dequantise)(fp8.Quantized(values, scales))
    np.testing.assert_array_equal(again, oracle.dequantise(*expected))
    # Half a step of the mantissa, or of the subnormal values; scales may be twice as large.
    step = float(jnp.finfo(wire.dtype).eps) / 2
    least = np.repeat(scales, wire.block, axis=-1) * float(jnp.finfo(wire.dtype).smallest_subnormal)
    exact = rows.astype(np.float64)
    assert (np.abs(again - exact) <= np.maximum(np.abs(exact) * step * 1.001, least)).all()


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_edges(wire):
    """Zeros of both signs stay; what is not finite takes its block with it, and no other one."""
    rows = np.zeros((7, 2 * wire.block), np.float32)
    rows[1] = -0.0
    rows[2, 0], rows[3, 1], rows[4, 2] = np.inf, np.nan, -np.inf
    rows[5, :] = 1e38
    rows[6, 0] = 1e-35  # below the least magnitude that has a scale of its own
    values, scales = quantised(rows, wire)
    again = np.asarray(fp8.dequantise(fp8.Quantized(values, scales)))
    np.testing.assert_array_equal(np.signbit(again[:2]), np.signbit(rows[:2]))
    assert not again[:2].any()
    for row in (2, 3, 4):
        assert np.isnan(again[row, : wire.block]).all() and np.isnan(scales[row, 0])
        assert not again[row, wire.block :].any()
    assert np.isfinite(scales[5]).all()
    np.testing.assert_allclose(again[5], rows[5], rtol=0.07)
    assert (np.abs(again[6] - rows[6]) <= 1e-34).all()


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"block": 48}, ValueError, "block=48, expected 32, 64 or 128"),
        ({"block": "32"}, TypeError, "block='32', expected a positive integer"),
        ({"dtype": jnp.bfloat16}, TypeError, "dtype=bfloat16, expected float8_e4m3fn or float8_e5"),
        ({"dtype": None}, TypeError, "dtype=None, expected a dtype"),
        ({"power_of_two": 1}, TypeError, "power_of_two=1, expected True or False"),
    ],
)
def test_bad_values(bad, error, match):
    with pytest.raises(error, match=match):
        smfree.Fp8(**bad)


def test_is_a_value():
    assert (
        smfree.Fp8() == smfree.Fp8(128, "float8_e4m3fn")
        and len({smfree.Fp8()} | {smfree.Fp8()}) == 1
    )
    assert smfree.Fp8() != smfree.Fp8(64)
    config = smfree.EpConfig(num_experts=8, top_k=2, hidden=16, max_tokens=4, wire=smfree.Fp8())
    assert hash(config) and "Fp8(block=128" in repr(config)
