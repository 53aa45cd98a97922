# SPDX-License-Identifier: Apache-2.0
"""The hierarchical mode against the direct one, and against the reference in plain jnp."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree._src import reference
from property.expectations import assert_same_bits
from property.round_trip import Program, Shape
from property.strategies import random_inputs
from support import ep_mesh, make_problem, random_routing, reference_of

pytestmark = pytest.mark.cpu_only

DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_modes_agree(dtype):
    """Dispatch and its transpose's operands to the bit, sums within the rounding of the dtype."""
    nodes = Shape(6, 12, 8, 9, 24, dtype, ranks_per_node=3)
    direct = Program(dataclasses.replace(nodes, ranks_per_node=None))
    hierarchical = Program(nodes)
    rng = np.random.default_rng(0)
    idx = random_routing(rng, nodes.ranks * nodes.tokens, nodes.top_k, nodes.experts)
    idx[rng.random(idx.shape) < 0.2] = -1
    idx = idx.reshape(nodes.ranks, nodes.tokens, nodes.top_k)
    case = random_inputs(rng, nodes, direct.num_rows, idx)
    with direct.group, hierarchical.group:
        expected, actual = direct(case)[0], hierarchical(case)[0]
    assert (expected.d.handle.relay == -1).all()
    without_relay = dataclasses.replace(actual.d.handle, relay=expected.d.handle.relay)
    assert_same_bits(actual.d.replace(handle=without_relay), expected.d)
    for field in ("topk_weights_ct", "y_cts", "weights_ct"):
        assert_same_bits(getattr(actual, field), getattr(expected, field))
    # Three roundings against two, each of a sum of at most `size`.
    eps = float(jnp.finfo(nodes.dtype).eps)
    for a, e in zip([*actual.outs, actual.x_ct], [*expected.outs, expected.x_ct], strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        size = max(1.0, np.abs(e).max()) * nodes.top_k
        np.testing.assert_allclose(a, e, rtol=0, atol=5 * eps * size)
        assert dtype == "float32" or (a != e).any(), "the modes are meant to round differently"


@pytest.mark.parametrize("ranks_per_node", [8, 4, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_have_the_bits_of_the_reference(groups, dtype, ranks_per_node):
    """A plain sum: no products, which compilers may fuse with the sums. Zeros have a sign."""
    mesh = ep_mesh(8)
    config = {"num_experts": 16, "top_k": 8, "hidden": 24, "max_tokens": 6, "dtype": dtype}
    group = groups(mesh, **config, ranks_per_node=ranks_per_node)
    problem = make_problem(mesh, top_k=8, experts=16, hidden=24, dtype=dtype)

    def plain_sum(ops, token, combine):
        def local(x, idx, weights, _):
            token_in_flight = ops.dispatch_send(token(), x, idx, weights)
            d, ready = ops.dispatch_recv(token_in_flight)
            y = jnp.sin(d.x.astype(jnp.float32)).at[:, 0].set(-0.0)
            return combine(ready, d, y.astype(dtype))

        smap = jax.shard_map(
            local, mesh=mesh, in_specs=problem.specs, out_specs=P("ep"), check_vma=False
        )
        return np.asarray(jax.jit(smap)(*problem.arrays))

    actual = plain_sum(smfree, group.token, lambda t, d, y: smfree.combine(t, d, y, None)[0])
    expected = plain_sum(
        reference, reference_of(group).token, lambda _, d, y: reference.combine(d, y, None)
    )
    assert_same_bits(actual, expected)


def test_a_row_crosses_once_per_node(groups):
    """Top-8 of 8 ranks in 2 nodes: 4 rows to the other node in direct mode, 1 in hierarchical."""
    mesh = ep_mesh(8)
    tokens, hidden, top_k = 32, 64, 8
    problem = make_problem(
        mesh, tokens=tokens, top_k=top_k, experts=8, hidden=hidden, none_fraction=0.0
    )
    row, copies = 4 * hidden, 2 * 4 * top_k  # with its expert ids and weights

    def internode(mode):
        group = groups(
            mesh, num_experts=8, top_k=top_k, hidden=hidden, max_tokens=tokens,
            dtype=jnp.float32, ranks_per_node=4, mode=mode,
        )  # fmt: skip

        def local(x, idx, weights, _):
            d, token = smfree.dispatch(group.token(), x, idx, weights)
            return smfree.combine(token, d, d.x)[0]

        smap = jax.shard_map(local, mesh=mesh, in_specs=problem.specs, out_specs=P("ep"))
        jax.block_until_ready(jax.jit(smap)(*problem.arrays))
        stats = group.stats()
        return stats["dispatch_internode_bytes"], stats["combine_internode_bytes"]

    rows = mesh.size * tokens
    assert internode("hierarchical") == (rows * (row + copies), rows * row)
    assert internode("direct") == (4 * rows * (row + copies), 4 * rows * row)
