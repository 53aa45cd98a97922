# SPDX-License-Identifier: Apache-2.0
"""The grouped matmuls for Hopper GPUs, in Pallas's interpreter, which looks for races."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("older interpreters do not know clusters", allow_module_level=True)
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from jax_smfree.nn import hopper  # noqa: E402

pytestmark = pytest.mark.cpu_only

# A group of several tiles and one of a few rows, empty ones, and ends at any row.
SIZES = (70, 0, 3, 290, 0)
ROWS = sum(SIZES) + 80
SMS = 2
GROUPS = [slice(end - size, end) for end, size in zip(np.cumsum(SIZES), SIZES, strict=True)]


# NumPy, which multiplies in the interpreter, warns of products that are not stored. The six
# warpgroups of a cluster wait for each other, each in a thread of XLA's, which has as many as there
# are cores or CPU devices: the tests have eight of these.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("size", [256, 128], ids=["clusters", "no clusters"])
def test_products_of_every_group(size, pairs):
    rng = np.random.default_rng(0)
    used, sizes = sum(SIZES), jnp.array(SIZES, jnp.int32)

    def values(*shape):
        return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(pairs)]

    # What is past the groups is felt by nothing, but dw reads a step of dy there.
    xs = [x.at[used:].set(jnp.nan) for x in values(ROWS, size)]
    dys = [
        y.at[used:].set(jnp.nan).at[used : used + hopper.DEPTH].set(0) for y in values(ROWS, size)
    ]
    ws = values(len(SIZES), size, size)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out = hopper.grouped_matmul(xs, ws, sizes, num_sms=SMS)
        dx = hopper.grouped_matmul(dys, ws, sizes, num_sms=SMS, transpose=True)
        dw = hopper.grouped_outer_product(xs[0], dys[0], sizes, num_sms=SMS)

    xs, ws, dys = ([np.asarray(a, np.float32) for a in arrays] for arrays in (xs, ws, dys))
    expected = (
        sum(_of_groups(x, w) for x, w in zip(xs, ws, strict=True)),
        sum(_of_groups(dy, w.swapaxes(1, 2)) for dy, w in zip(dys, ws, strict=True)),
        np.stack([xs[0][rows].T @ dys[0][rows] for rows in GROUPS]),
    )
    for got, want in zip((out[:used], dx[:used], dw), expected, strict=True):
        np.testing.assert_allclose(np.float32(got), want, rtol=2e-2, atol=0.3)


tiles_of_rows = jax.jit(hopper._tiles_of_rows, static_argnums=1)


@hypothesis.given(
    sizes=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 1000)), min_size=8, max_size=8)
)
@hypothesis.settings(deadline=None)
def test_every_row_is_in_one_tile(sizes):
    """Of its group, whose tiles follow one another, and no row past the groups is in one."""
    (count,), tiles = map(np.asarray, tiles_of_rows(jnp.array(sizes, jnp.int32), 8000))
    rows, ends = np.zeros(8000, int), np.cumsum(sizes)
    for number, (base, of_group, group, begin, end, first, width) in enumerate(tiles[:count]):
        assert (begin, end) == (ends[group] - sizes[group], ends[group])
        assert (tiles[base : base + of_group, 2] == group).all()
        assert base <= number < base + of_group
        assert first % hopper.ATOM == 0 and hopper.WIDTHS[width]
        rows[max(first, begin) : min(first + hopper.WIDTHS[width], end)] += 1
    assert (rows == (np.arange(8000) < sum(sizes))).all()


def _of_groups(x, w):
    return np.concatenate([x[rows] @ w[g] for g, rows in enumerate(GROUPS)])
