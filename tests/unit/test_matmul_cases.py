# SPDX-License-Identifier: Apache-2.0
"""The benchmark of grouped matmuls finds what is wrong with a candidate."""

import jax
import jax.numpy as jnp
import pytest

import clone  # noqa: F401  (for benchmarks)
from benchmarks.gpu.matmul_candidates import Candidate, Kernels
from benchmarks.gpu.matmul_cases import SMOKE_CHECK_WIDTHS, TOLERANCE, check

pytestmark = pytest.mark.cpu_only


def right(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes)


def of_the_first_group(x, w, sizes):
    """Takes all rows for those of one group."""
    return x @ w[0]


def dw(x, dy, sizes):
    """By masks that multiply, so that a NaN past the groups is one everywhere."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    of_group = jax.nn.one_hot(group, sizes.shape[0], dtype=x.dtype)
    return jnp.einsum("ng,nh,nf->ghf", of_group, x, dy, preferred_element_type=jnp.float32)


def found(kernels):
    return check(Candidate("", lambda: kernels), SMOKE_CHECK_WIDTHS)


def test_what_is_right_is_found_right():
    result = found(Kernels(forward=right))
    assert result["small"]["forward"] < TOLERANCE and result["leaks"] == []


def test_a_wrong_product_is_found():
    result = found(Kernels(forward=of_the_first_group))
    assert result["small"]["forward"] > TOLERANCE


def test_a_nan_that_spreads_is_found():
    result = found(Kernels(dw=dw))
    assert result["small"]["dw"] < TOLERANCE and result["leaks"] == ["dw"]
