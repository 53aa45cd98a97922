# SPDX-License-Identifier: Apache-2.0
"""Placements of physical experts, and an MoE block that computes the same with them as without."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree import nn
from jax_smfree._src import reference
from jax_smfree.nn import physical
from property.strategies import examples
from support import as_many, assert_trees_close, devices, ep_mesh

EXPERTS, TOP_K, HIDDEN, WIDTH, ROWS = 8, 3, 8, 12, 80


def rank_loads(placement, load, ranks):
    """Rows of each rank if the rows of an expert divide evenly over its copies."""
    copies = np.bincount(placement.logical_of_physical)
    of_physical = (load / copies)[list(placement.logical_of_physical)]
    return of_physical.reshape(ranks, -1).sum(axis=1)


def test_the_example_of_eplb():
    """Of the README of deepseek-ai/EPLB: two layers, 16 copies of 12 experts in 4 groups."""
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    expected = [
        (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
        (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
    ]
    for load, placed in zip(loads, expected, strict=True):
        plan = nn.plan_placement(np.array(load), 16, num_ranks=8, num_nodes=2, num_groups=4)
        assert plan.logical_of_physical == placed


@examples(100)
@given(st.data())
def test_plans(data):
    """Every expert has a copy, and all copies of a group of experts are in one node."""
    nodes, ranks_per_node = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 1), (3, 2)]))
    groups_per_node, of_group = data.draw(st.sampled_from([(1, 4), (2, 2), (4, 1)]))
    groups, ranks = nodes * groups_per_node, nodes * ranks_per_node
    experts = groups * of_group
    spare = data.draw(st.integers(0, 2)) * ranks
    physical_experts = -(-experts // ranks) * ranks + spare
    load = np.array(data.draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts)))

    plan = nn.plan_placement(load, physical_experts, ranks, nodes, num_groups=groups)
    assert (plan.num_experts, plan.num_physical) == (experts, physical_experts)
    node_of = np.arange(physical_experts) // (physical_experts // nodes)
    groups_of_nodes = [
        {plan.logical_of_physical[p] // of_group for p in np.flatnonzero(node_of == node)}
        for node in range(nodes)
    ]
    assert all(len(found) == groups_per_node for found in groups_of_nodes)
    assert set().union(*groups_of_nodes) == set(range(groups))


@examples(60)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=4), st.integers(0, 4))
def test_copies_go_where_the_load_per_copy_is_largest(load, more):
    """No other numbers of copies have a smaller largest load of a copy."""
    load = np.array(load, np.float64)
    number = load.size + more
    got = np.bincount(physical._copies(load, number))
    assert got.sum() == number and got.min() >= 1
    best = min(
        (load / np.array(copies)).max()
        for copies in itertools.product(range(1, number + 1), repeat=load.size)
        if sum(copies) == number
    )
    assert (load / got).max() == pytest.approx(best)


def test_a_plan_evens_out_a_skewed_load():
    load = np.array([1000, 10, 20, 400, 30, 40, 50, 60])
    without = load.reshape(4, 2).sum(axis=1)
    plan = nn.plan_placement(load, 12, 4)
    planned = rank_loads(plan, load, 4)
    assert planned.max() / planned.mean() < 1.2 < without.max() / without.mean()


def test_spread_takes_copies_in_turn():
    placement = nn.ExpertPlacement((0, 1, 2, 1, 1))
    idx = jnp.array([[1, -1], [1, 0], [2, 1], [1, -1], [-1, -1]], jnp.int32)
    routes = nn.balanced_routes(5, 3, 2)._replace(topk_idx=idx)
    got = nn.spread(routes, placement).topk_idx
    np.testing.assert_array_equal(got, [[1, -1], [3, 0], [2, 4], [1, -1], [-1, -1]])
    shifted = jax.jit(lambda rank: nn.spread(routes, placement, rank=rank).topk_idx)(2)
    np.testing.assert_array_equal(shifted, [[4, -1], [1, 0], [2, 3], [4, -1], [-1, -1]])
    assert got.dtype == jnp.int32


def test_moves_between_placements():
    first, second = nn.ExpertPlacement((2, 0, 1, 0)), nn.ExpertPlacement((1, 1, 2, 0, 2, 0))
    logical = {"gate": np.arange(3 * 2.0).reshape(3, 2), "bias": np.arange(3)}
    moved = nn.move_parameters(logical, None, first)
    np.testing.assert_array_equal(moved["bias"], [2, 0, 1, 0])
    np.testing.assert_array_equal(moved["gate"], logical["gate"][[2, 0, 1, 0]])
    again = nn.move_parameters(moved, first, second)
    np.testing.assert_array_equal(again["bias"], [1, 1, 2, 0, 2, 0])
    back = nn.move_parameters(again, second, None)
    assert_trees_close(back, logical, 0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_moves_keep_the_sharding(kind):
    mesh = Mesh(devices(as_many(4, 2)), ("ep",), axis_types=(kind,))
    placement = nn.plan_placement(np.arange(8), 12, 4)
    logical = jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh, P("ep")))
    moved = nn.move_parameters(logical, None, placement)
    assert moved.sharding.spec[0] == "ep"
    np.testing.assert_array_equal(moved[:, 0] / 2, placement.logical_of_physical)
    back = nn.move_parameters(moved, placement, None)
    assert back.sharding == logical.sharding
    np.testing.assert_array_equal(back, logical)


@pytest.mark.parametrize("ops", [smfree, reference], ids=["library", "reference"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_copies_change_no_output_and_no_gradient(ops, check_vma):
    """Of a block of the operations; gradients of an expert are those of its copies, summed."""
    ranks = as_many(4)
    mesh = ep_mesh(ranks)
    placement = nn.plan_placement(np.array([50, 1, 2, 30, 3, 1, 1, 2]), 16, ranks)
    assert len(placement.physical_of_logical[0]) > 1
    params = nn.init_moe(jax.random.key(0), hidden=HIDDEN, num_experts=EXPERTS, expert_width=WIDTH)
    # Rows of which each copy gets some, however many ranks they are split over.
    x = jax.random.normal(jax.random.key(3), (ROWS, HIDDEN))
    mask = jnp.arange(ROWS) % 5 != 3
    config = nn.RouterConfig(TOP_K, score="sigmoid")

    def result(placement):
        """Output, gradients, and the rows that each physical expert got."""
        number = EXPERTS if placement is None else placement.num_physical
        sizes = smfree.EpConfig(num_experts=number, top_k=TOP_K, hidden=HIDDEN,
                                max_tokens=ROWS // ranks, dtype=jnp.float32)  # fmt: skip
        with smfree.EpGroup.create(mesh, config=sizes) as group:
            start = group if ops is smfree else reference.Group(group.axis, group.config)

            def on_each_rank(router, experts, x, mask):
                routes = nn.route(x, router, config, mask=mask)
                if placement is not None:
                    routes = nn.spread(routes, placement, rank=jax.lax.axis_index("ep"))
                token = ops.dispatch_send(start.token(), x, routes.topk_idx, routes.topk_weights)
                d, token = ops.dispatch_recv(token)
                local_expert = nn.local_expert(d.group_sizes, d.x.shape[0])
                y = nn.grouped_mlp(d.x, d.group_sizes, local_expert, experts)
                token = ops.combine_send(token, d, y)
                return ops.combine_recv(token)[0], d.group_sizes

            block = jax.shard_map(
                on_each_rank, mesh=mesh, in_specs=(P(), P("ep"), P("ep"), P("ep")),
                out_specs=P("ep"), check_vma=check_vma,
            )  # fmt: skip

            def loss(params, x):
                experts = nn.move_parameters(params.experts, None, placement)
                out, load = block(params.router, experts, x, mask)
                return jnp.sum(jnp.sin(out)), (out, load)

            return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    gradients, (out, load) = result(None)
    spread_gradients, (spread_out, spread_load) = result(placement)
    assert_trees_close(spread_out, out)
    assert_trees_close(spread_gradients, gradients)
    summed = np.zeros(EXPERTS, int)
    np.add.at(summed, list(placement.logical_of_physical), np.asarray(spread_load))
    np.testing.assert_array_equal(summed, load)
    for copies in placement.physical_of_logical:
        assert all(spread_load[p] > 0 for p in copies)
    assert jnp.abs(gradients[0].experts.gate).max() > 1e-3


PLACEMENT = nn.ExpertPlacement((0, 1, 0))
REFUSED = {
    "an expert without a copy": (
        lambda: nn.ExpertPlacement((0, 2, 2)), ValueError, "without expert 1",
    ),
    "no experts": (lambda: nn.ExpertPlacement(()), TypeError, "expected a tuple"),
    "too few copies": (
        lambda: nn.plan_placement(np.ones(4), 3, 1), ValueError, "num_physical=3 for 4 experts",
    ),
    "ranks that do not divide": (
        lambda: nn.plan_placement(np.ones(4), 6, 4), ValueError, "6, expected a multiple of num_ra",
    ),
    "nodes that do not divide": (
        lambda: nn.plan_placement(np.ones(4), 6, 3, 2), ValueError, "3, expected a .* num_nodes",
    ),
    "groups that do not divide": (
        lambda: nn.plan_placement(np.ones(4), 6, 2, num_groups=3), ValueError, "num_groups, .* 3",
    ),
    "a traced load": (
        lambda: jax.jit(lambda load: nn.plan_placement(load, 4, 1) and 0)(jnp.ones(4)),
        TypeError, "traced load",
    ),
    "a negative load": (lambda: nn.plan_placement(-np.ones(4), 4, 1), ValueError, "negative"),
    "parameters of others": (
        lambda: nn.move_parameters(jnp.ones((3, 2)), None, PLACEMENT),
        ValueError, r"\[3, 2\] among params, expected \[2, ...\]",
    ),
    "placements of others": (
        lambda: nn.move_parameters(jnp.ones(3), PLACEMENT, nn.ExpertPlacement((0, 1, 2))),
        ValueError, "of 2 and of 3 logical",
    ),
    "routes of others": (
        lambda: nn.spread(nn.balanced_routes(4, 3, 1), PLACEMENT),
        ValueError, r"routes.probabilities\[4, 3\], expected routes.probabilities\[4, 2\]",
    ),
    "a rank before the first": (
        lambda: nn.spread(nn.balanced_routes(4, 2, 1), PLACEMENT, rank=-1), ValueError, "rank=-1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        call()
