# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_smfree as smfree
from support import ep_mesh

GOOD = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8}


def test_defaults():
    config = smfree.EpConfig(**GOOD)
    assert config.dtype == np.dtype(jnp.bfloat16)
    assert hash(config) == hash(smfree.EpConfig(**GOOD, dtype="bfloat16"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden = 3


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"top_k": 0}, ValueError, "top_k=0"),
        ({"top_k": 9}, ValueError, "top_k <= num_experts"),
        ({"hidden": 1.5}, ValueError, r"hidden=1\.5"),
        ({"max_tokens": True}, ValueError, "max_tokens=True"),
        ({"dtype": jnp.int8}, TypeError, "dtype=int8"),
        ({"recv_capacity": 0}, ValueError, "recv_capacity=0"),
        ({"timeout_s": 0.0}, ValueError, "deadline"),
        ({"timeout_s": float("inf")}, ValueError, "deadline"),
        ({"overflow": "ignore"}, ValueError, "'error' or 'drop'"),
    ],
)
def test_bad_values(bad, error, match):
    with pytest.raises(error, match=match):
        smfree.EpConfig(**(GOOD | bad))


@pytest.mark.parametrize(
    ("config", "axis", "match"),
    [
        ({"num_experts": 6}, "ep", "num_experts=6 over 4 ranks"),
        ({}, "expert", "axis='expert'"),
        ({"ranks_per_node": 2}, "ep", "direct mode only"),
    ],
)
def test_bad_group(groups, config, axis, match):
    with pytest.raises(ValueError, match=match):
        groups(ep_mesh(4), axis, **(GOOD | config))


def test_size_hints_count_the_rows():
    """The seed's formula, max_tokens * hidden * itemsize * peers * 2, per lane and parity."""
    config = smfree.EpConfig(**(GOOD | {"num_experts": 16}), num_lanes=3, ranks_per_node=4)
    rows_bytes = 8 * 16 * 2 * 2
    sets = 3 * 3 * 2  # lanes; forward, backward and replayed operations; parities
    rdma, nvl = smfree.rdma_size_hint(config, 16), smfree.nvl_size_hint(config, 16)
    assert rdma > sets * rows_bytes * 4
    assert nvl > sets * rows_bytes * 4
    single_node = dataclasses.replace(config, ranks_per_node=None)
    assert smfree.rdma_size_hint(single_node, 4) == 0
    assert smfree.nvl_size_hint(single_node, 4) > sets * rows_bytes * 4
    longer = dataclasses.replace(single_node, hidden=16 + 1024)
    grown = smfree.nvl_size_hint(longer, 4) - smfree.nvl_size_hint(single_node, 4)
    assert grown == sets * 8 * 1024 * 2 * 4 * 2


@given(
    ranks=st.integers(1, 8),
    local=st.integers(1, 5),
    top_k=st.integers(1, 6),
    tokens=st.integers(1, 9),
    alignment=st.integers(1, 9),
)
def test_worst_case_is_enough_and_no_more(ranks, local, top_k, tokens, alignment):
    top_k = min(top_k, ranks * local)
    config = smfree.EpConfig(
        num_experts=ranks * local, top_k=top_k, hidden=1, max_tokens=tokens,
        expert_alignment=alignment,
    )  # fmt: skip
    rows = config.num_recv_rows(tokens, ranks)
    copies = ranks * tokens * min(top_k, local)
    worst = 0  # the split of the copies over experts with the most padding
    for filled in range(1, min(local, copies) + 1):
        each = [copies // filled + (i < copies % filled) for i in range(filled)]
        worst = max(worst, sum(-(-n // alignment) * alignment for n in each))
    assert rows % alignment == 0
    assert worst <= rows <= worst + alignment * local
