# SPDX-License-Identifier: Apache-2.0
"""The kernels that the benchmark of grouped matmuls has as candidates, in Pallas's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("older interpreters do not know clusters", allow_module_level=True)
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

import clone  # noqa: E402, F401  (for benchmarks)
from benchmarks.gpu import matmul_rings as rings  # noqa: E402

pytestmark = pytest.mark.cpu_only

# A group of several tiles and one of a few rows, empty ones, and ends at any row.
SIZES = (70, 0, 3, 290, 0)
ROWS = sum(SIZES) + 80
HIDDEN, WIDTH, SMS = 256, 256, 2
# The six warpgroups of a cluster wait for each other, each in a thread of XLA's, which has as many
# as there are cores or CPU devices: the tests have eight of these.
TILES = {
    "clusters": rings.Tiles(),
    "narrow units": rings.Tiles(blocks=1, unit=16, in_flight=0),
    "short steps": rings.Tiles(blocks=1, depth=32, stages=8),
}


# NumPy, which multiplies in the interpreter, warns of products that are not stored.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_products_of_every_group(tiles):
    rng = np.random.default_rng(0)
    used, sizes = sum(SIZES), jnp.array(SIZES, jnp.int32)

    def values(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    # What is past the groups is felt by nothing, but dw reads a step of dy there.
    x = values(ROWS, HIDDEN).at[used:].set(jnp.nan)
    dy = values(ROWS, WIDTH).at[used:].set(jnp.nan).at[used : used + tiles.depth].set(0)
    w = values(len(SIZES), HIDDEN, WIDTH)
    options = {"num_sms": SMS, "tiles": tiles}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out = rings.grouped_matmul(x, w, sizes, **options)
        dx = rings.grouped_matmul(dy, w, sizes, transpose=True, **options)
        dw = rings.grouped_outer_product(x, dy, sizes, **options)

    x, w, dy = (np.asarray(a, np.float32) for a in (x, w, dy))
    groups = [slice(end - size, end) for end, size in zip(np.cumsum(SIZES), SIZES, strict=True)]
    expected = (
        np.concatenate([x[rows] @ w[g] for g, rows in enumerate(groups)]),
        np.concatenate([dy[rows] @ w[g].T for g, rows in enumerate(groups)]),
        np.stack([x[rows].T @ dy[rows] for rows in groups]),
    )
    for got, want in zip((out[:used], dx[:used], dw), expected, strict=True):
        np.testing.assert_allclose(np.float32(got), want, rtol=2e-2, atol=0.2)
