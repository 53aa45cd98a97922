# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import _native
from jax_smfree._src import nodes
from jax_smfree._src.native_config import native_config
from support import as_many, ep_mesh, make_problem

GOOD = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8}
CONFIG = smfree.EpConfig(**GOOD)


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
        ({"wire_capacity": 0}, ValueError, "wire_capacity=0, expected a positive integer"),
        ({"wire_capacity": 2.5}, ValueError, r"wire_capacity=2\.5"),
        ({"timeout_s": 0.0}, ValueError, "deadline"),
        ({"timeout_s": float("inf")}, ValueError, "deadline"),
        ({"timeout_s": 1.1e6}, ValueError, "at most 1,000,000: every wait has a deadline"),
        ({"timeout_s": 1e10}, ValueError, "timeout_s=10000000000.0"),
        ({"timeout_s": 10**400}, ValueError, "deadline"),
        ({"timeout_s": "60"}, TypeError, "timeout_s='60', expected a positive number of seconds"),
        ({"max_tokens": 2**63}, ValueError, "max_tokens=9223372036854775808, .*at most 2147483647"),
        ({"num_experts": 2**33}, ValueError, "num_experts=8589934592"),
        ({"expert_alignment": 2**31}, ValueError, "expert_alignment=2147483648"),
        ({"sm_push_bytes": 2**63}, ValueError, "sm_push_bytes"),
        ({"sm_push_bytes": -1}, ValueError, "sm_push_bytes=-1, expected 0 to"),
        ({"top_k": "2"}, TypeError, "top_k='2', expected a positive integer"),
        ({"hidden": [16]}, TypeError, "hidden=a list, expected a positive integer"),
        ({"dtype": "x"}, TypeError, "dtype='x', expected a dtype such as"),
        ({"dtype": None}, TypeError, "dtype=None, expected a dtype"),
        ({"differentiable": "no"}, TypeError, "differentiable='no', expected True or False"),
        ({"differentiable": 1}, TypeError, "differentiable=1, expected True or False"),
        ({"overflow": ["error"]}, ValueError, "overflow=a list, expected 'error' or 'drop'"),
        (
            {"recv_capacity": 10, "expert_alignment": 4},
            ValueError,
            "recv_capacity=10 with expert_alignment=4, expected a multiple.*recv_capacity=8 or 12",
        ),
        ({"recv_capacity": 3, "expert_alignment": 4}, ValueError, "Set recv_capacity=4"),
        ({"overflow": "ignore"}, ValueError, "'error' or 'drop'"),
        ({"dtype": jnp.int8}, TypeError, "dtype=int8, expected one of float32, bfloat16"),
        ({"wire": jnp.float8_e5m2}, TypeError, "as wire, expected a Fp8. Or None"),
        ({"grad_wire": True}, TypeError, "True as grad_wire, expected a Fp8"),
        ({"mode": "ring"}, ValueError, "'direct', 'hierarchical' or None"),
        ({"puts": "nic"}, ValueError, "'host' or 'device'"),
        ({"layout": "dense"}, ValueError, "layout='dense', expected 'grouped' or 'padded'"),
    ],
)
def test_bad_values(bad, error, match):
    with pytest.raises(error, match=match):
        smfree.EpConfig(**(GOOD | bad))


@pytest.mark.parametrize(
    ("config", "axis", "match"),
    [
        ({"num_experts": 6}, "ep", "num_experts=6 over 4 ranks"),
        (
            {"layout": "padded", "recv_capacity": 15},
            "ep",
            "recv_capacity=15 with layout='padded' and 2 experts .* of 2: .* recv_capacity=16",
        ),
        ({}, "expert", r"axis='expert', expected one of the mesh's axes \['ep'\]"),
        ({}, ("dp", "ep"), r"axis=\('dp', 'ep'\), expected without \['dp'\], some of the mesh's"),
        ({}, ("ep", "ep"), r"axis=\('ep', 'ep'\), expected .* each of them once"),
        ({}, (), r"axis=\(\), expected .* at least one name"),
        ({"ranks_per_node": 3}, "ep", "ranks_per_node=3 for 4 ranks, expected a divisor"),
        ({"mode": "hierarchical"}, "ep", "4 ranks in nodes of 4, expected more than one node"),
        ({"mode": "hierarchical", "ranks_per_node": 1}, "ep", "more than one rank in each"),
    ],
)
def test_bad_group(groups, config, axis, match):
    with pytest.raises(ValueError, match=match):
        groups(ep_mesh(4), axis, **(GOOD | config))


@pytest.mark.parametrize(
    ("config", "mode", "ranks_per_node"),
    [
        ({}, "direct", 4),  # the devices of a process are a node
        ({"ranks_per_node": 4}, "direct", 4),
        ({"ranks_per_node": 1}, "direct", 1),
        ({"ranks_per_node": 2, "mode": "direct"}, "direct", 2),
        ({"ranks_per_node": 2}, "hierarchical", 2),
    ],
)
def test_the_mode_follows_from_the_nodes(groups, config, mode, ranks_per_node):
    group = groups(ep_mesh(4), **(GOOD | config))
    assert (group.config.mode, group.config.ranks_per_node) == (mode, ranks_per_node)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: smfree.EpGroup.create(ep_mesh(1), config={}), TypeError, "a dict as config"),
        (lambda: smfree.EpGroup.create(None, config=CONFIG), TypeError, "NoneType as mesh"),
        (
            lambda: smfree.EpGroup.create(ep_mesh(1), ["ep"], config=CONFIG),
            TypeError, "a list as axis, expected the name of a mesh axis, or a tuple of names",
        ),
        (
            lambda: smfree.EpGroup.create(ep_mesh(1), ("ep", 0), config=CONFIG),
            TypeError, r"\('ep', 0\) as axis",
        ),
        (lambda: smfree.nvl_size_hint(CONFIG, 0), ValueError, "num_ranks=0, expected a positive"),
        (lambda: smfree.rdma_size_hint(CONFIG, 2.0), ValueError, r"num_ranks=2\.0"),
        (lambda: smfree.rdma_size_hint(CONFIG, 3), ValueError, "num_experts=8 and num_ranks=3"),
        (lambda: smfree.rdma_size_hint({}, 2), TypeError, "a dict as config, expected an EpConfig"),
        (
            lambda: smfree.nvl_size_hint(
                dataclasses.replace(CONFIG, hidden=2**31 - 1, max_tokens=2**31 - 1), 8
            ),
            ValueError, "less than an exbibyte",
        ),
        (lambda: CONFIG.num_recv_rows(2**31 - 1, 8), ValueError, "numbered by int32"),
        (lambda: CONFIG.num_recv_rows(8, 3), ValueError, "num_experts=8 over 3 ranks"),
        (
            lambda: dataclasses.replace(CONFIG, layout="padded").num_recv_rows(2**29, 2),
            ValueError, "numbered by int32",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_native_groups_bound_deadlines_too():
    config = native_config(nodes.resolve("test", CONFIG, [[0]]), 1)
    config.timeout_s = 1e10
    with pytest.raises(RuntimeError, match=r"timeout_s is 1e\+?10|timeout_s is 10000000000"):
        _native.CpuGroup(
            group_id=1, replica=0, config=config, process_of_rank=[0], process=0, secret=""
        )


def test_the_longest_deadline(groups):
    """It is no overflow of a clock: an operation that waits for others gets through."""
    group = groups(ep_mesh(as_many(2)), **(GOOD | {"timeout_s": _native.MAX_TIMEOUT_S}))
    problem = make_problem(group.mesh, hidden=16, dtype=jnp.bfloat16)

    def step(x, idx, weights):
        d, token = smfree.dispatch(group.token(), x, idx, weights)
        return smfree.combine(token, d, d.x)[0]

    smap = jax.shard_map(step, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep"))
    out = jax.jit(smap)(*problem.arrays[:3])
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_symbolic_rows_are_refused(groups):
    """`jax.export` with symbolic shapes: places of rows are laid out while tracing."""
    group = groups(ep_mesh(as_many(2)), **(GOOD | {"dtype": jnp.float32}))

    def step(x, idx):
        return smfree.dispatch(group.token(), x, idx)[0].x

    smap = jax.shard_map(step, mesh=group.mesh, in_specs=P("ep"), out_specs=P("ep"))
    scope = jax.export.SymbolicScope()
    shapes = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), dtype)
        for shape, dtype in ((f"{group.num_ranks}*t, 16", "float32"),
                             (f"{group.num_ranks}*t, 2", "int32"))
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"dispatch_send: got x\[.*t, 16\], expected a number of"):
        jax.export.export(jax.jit(smap))(*shapes)


HARDWARE = {  # the nodes of the ranks of each group: ranks_per_node
    ((0, 0, 1, 1),): 2,
    ((3, 3, 3, 3), (5, 5, 5, 5)): 4,
    ((0, 1, 2, 3),): 1,
    ((0, 1, 0, 1),): None,
    ((0, 0, 0, 1),): None,
    ((0, 0, 1, 2),): None,
    ((0, 0, 1, 1), (2, 2, 2, 2)): None,
}


@pytest.mark.parametrize("hardware", HARDWARE, ids=str)
def test_nodes_are_equally_large_and_contiguous(hardware):
    config = smfree.EpConfig(**GOOD)
    if HARDWARE[hardware] is None:
        with pytest.raises(ValueError, match=r"test: got ranks in the nodes .*mode='direct'"):
            nodes.resolve("test", config, hardware)
        config = dataclasses.replace(config, mode="direct")
        assert nodes.resolve("test", config, hardware).mode == "direct"
        config = dataclasses.replace(config, mode=None, ranks_per_node=2)
        assert nodes.resolve("test", config, hardware).mode == "hierarchical"
    else:
        assert nodes.resolve("test", config, hardware).ranks_per_node == HARDWARE[hardware]


def test_size_hints_of_two_modes():
    """Over the network: two buffers per peer and set, the peers being ranks or nodes; and headers.

    Each set has them twice, one for each parity.
    """
    config = smfree.EpConfig(**(GOOD | {"num_experts": 16}), num_sets=9, ranks_per_node=4)
    sets, ranks, num_nodes = 9 * 2, 16, 4
    rows = config.max_tokens * config.hidden * config.dtype.itemsize
    slots = 128 + 128  # expert ids and weights, in whole lines
    header = 128 + 128  # identity; counts per expert of a rank or of a node
    signals, fault_word = 128, 128
    region = header + slots + rows
    over_network = fault_word + sets * (signals + num_nodes * 2 * region)
    assert smfree.rdma_size_hint(config, ranks) == over_network
    assert smfree.nvl_size_hint(config, ranks) == sets * (signals + ranks * 2 * region)
    direct = dataclasses.replace(config, mode="direct")
    over_network = fault_word + sets * (signals + ranks * 2 * region)
    assert smfree.rdma_size_hint(direct, ranks) == over_network
    assert smfree.nvl_size_hint(direct, ranks) == 0


def test_size_hints_count_the_rows():
    """max_tokens * hidden * itemsize * peers * 2 per set and parity, where rows move by region.

    ``GOOD`` has operations so small that they do in one node, too.
    """
    config = smfree.EpConfig(**(GOOD | {"num_experts": 16}), num_lanes=3, ranks_per_node=4)
    rows_bytes = 8 * 16 * 2 * 2
    sets = (3 * 3 + 2) * 2  # the default for three lanes; parities
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


@pytest.mark.parametrize(
    ("more", "shape"),
    [
        ({}, (80,)),  # 4 ranks, 10 rows, to both of the experts
        ({"layout": "padded"}, (2, 40)),
        ({"layout": "padded", "expert_alignment": 16}, (2, 48)),
        ({"layout": "padded", "recv_capacity": 24, "expert_alignment": 4}, (2, 12)),
    ],
    ids=str,
)
def test_shape_of_what_is_received(more, shape):
    config = smfree.EpConfig(**(GOOD | {"max_tokens": 10}), **more)
    assert config.recv_shape(10, num_ranks=4) == shape
    assert config.num_recv_rows(10, num_ranks=4) == np.prod(shape)


@pytest.mark.parametrize(
    ("capacities", "rows_of_ten", "rows_of_two"),
    [
        ({}, 40, 8),
        ({"recv_capacity": 30}, 30, 8),
        ({"recv_capacity": 100}, 40, 8),
        ({"recv_capacity": 30, "wire_capacity": 35}, 35, 8),
        ({"wire_capacity": 3}, 3, 3),
    ],
)
def test_rows_on_the_wire(capacities, rows_of_ten, rows_of_two):
    config = smfree.EpConfig(**(GOOD | {"max_tokens": 10}), **capacities)
    assert config.num_wire_rows(10, num_ranks=4) == rows_of_ten
    assert config.num_wire_rows(2, num_ranks=4) == rows_of_two
