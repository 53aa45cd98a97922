# SPDX-License-Identifier: Apache-2.0
"""What lies past the groups reaches nothing, with any grouped matmul of the package."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_smfree import nn
from jax_smfree.nn import matmul

BLOCK, HIDDEN, WIDTH = 8, 128, 128  # sizes that the kernels for Hopper take
SIZES = [[16, 0, 24], [0, 0, 0], [0, 8, 0], [0, 0, 40]]
ROWS = 56


def kernels(x, w, sizes):
    """The kernels for Hopper, also where there is no such GPU."""
    return matmul._on_hopper(x, (w,), sizes, 2)[0]


@contextlib.contextmanager
def interpreted():
    """Kernels of Pallas run in its interpreter."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("the kernels need JAX 0.11")
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


MATMULS = {
    "grouped_matmul": nn.grouped_matmul,
    "block_matmul": functools.partial(nn.block_matmul, block_rows=BLOCK),
    "ragged_dot": jax.lax.ragged_dot,
    "kernels": pytest.param(kernels, marks=pytest.mark.cpu_only),  # on GPUs grouped_matmul is them
}


# NumPy, which multiplies in the interpreter, warns of products that are not stored.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("past", [np.nan, np.inf])
@pytest.mark.parametrize("group_sizes", SIZES, ids=str)
@pytest.mark.parametrize("multiply", MATMULS.values(), ids=MATMULS)
def test_nothing_past_the_groups_is_felt(multiply, group_sizes, past):
    if multiply is kernels and np.isinf(past):
        pytest.skip("the interpreter takes long, and NaN is felt wherever this is")
    rng = np.random.default_rng(0)
    sizes = jnp.array(group_sizes, jnp.int32)
    used = sum(group_sizes)

    def rows(width):
        values = rng.standard_normal((ROWS, width)).astype(np.float32)
        values[used:] = past
        return jnp.asarray(values, jnp.bfloat16)

    x, dy = rows(HIDDEN), rows(WIDTH)
    w = jnp.asarray(rng.standard_normal((len(group_sizes), HIDDEN, WIDTH)), jnp.bfloat16)
    with interpreted() if multiply is kernels else contextlib.nullcontext():
        out, pull = jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)
        dx, dw = pull(dy)

    ends = np.cumsum(group_sizes)
    of_group = [slice(end - size, end) for end, size in zip(ends, group_sizes, strict=True)]
    x, w, dy = (np.asarray(a, np.float32) for a in (x, w, dy))
    expected = (
        np.concatenate([x[rows] @ w[g] for g, rows in enumerate(of_group)]),
        np.concatenate([dy[rows] @ w[g].T for g, rows in enumerate(of_group)]),
        np.stack([x[rows].T @ dy[rows] for rows in of_group]),
    )
    for got, want in zip((out[:used], dx[:used], dw), expected, strict=True):
        np.testing.assert_allclose(np.float32(got), want, rtol=2e-2, atol=0.1)


def test_rows_past_the_groups_are_zero_in_a_block_matmul():
    x, w = jnp.ones((16, 4)).at[8:].set(jnp.nan), jnp.ones((2, 4, 3))
    out, pull = jax.vjp(lambda x: nn.block_matmul(x, w, jnp.array([0, 8]), block_rows=8), x)
    (dx,) = pull(jnp.full((16, 3), jnp.nan).at[:8].set(1.0))
    assert (out[:8] == 4).all() and (out[8:] == 0).all()
    assert (dx[:8] == 3).all() and (dx[8:] == 0).all()


X, W, SIZES_3 = np.zeros((16, 4), np.float32), np.zeros((3, 4, 5), np.float32), np.zeros(3, int)
REFUSED = {
    "two dtypes": ((X, W.astype(jnp.bfloat16), SIZES_3), TypeError, "x of float32 and w of bf"),
    "another width": ((X[:, :2], W, SIZES_3), ValueError, r"w\[3, 4, 5\], expected w\[G, 2, F\]"),
    "sizes of others": ((X, W, SIZES_3[:2]), ValueError, r"group_sizes\[2\], expected .*\[3\]"),
    "float sizes": ((X, W, np.zeros(3)), TypeError, "group_sizes of float.*, expected integers"),
    "a list": ((X.tolist(), W, SIZES_3), TypeError, "a list as x, expected an array"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("multiply", ["grouped_matmul", "block_matmul"])
def test_what_is_refused(multiply, name):
    operands, error, match = REFUSED[name]
    with pytest.raises(error, match=f"{multiply}: got .*{match}"):
        MATMULS[multiply](*operands)
