# SPDX-License-Identifier: Apache-2.0
"""Losses, biases and metrics of the experts' load against loops over sequences and experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_smfree import nn
from support import as_many, ep_mesh

ROWS, EXPERTS, TOP_K = 24, 6, 2
CONFIG = nn.RouterConfig(TOP_K, score="sigmoid")


def routes_of(seed=0, rows=ROWS, config=CONFIG, bias=None, masked=0.3):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, EXPERTS)).astype(np.float32) + np.linspace(1, -1, EXPERTS)
    mask = rng.random(rows) >= masked
    return nn.route(
        jnp.asarray(logits, jnp.float32), jnp.eye(EXPERTS), config, balance_bias=bias, mask=mask
    )


def plain_loss(idx, probabilities):
    """Of one sequence: equations 17 to 20 of DeepSeek-V3, without alpha."""
    rows = [t for t in range(len(idx)) if (idx[t] >= 0).any()]
    total = 0.0
    for expert in range(EXPERTS):
        chosen = sum((idx[t] == expert).any() for t in rows)
        f = EXPERTS / (TOP_K * len(rows)) * chosen
        total += f * np.mean([probabilities[t, expert] for t in rows])
    return total


def parts_of(routes, ids, number):
    """(topk_idx, probabilities) of each sequence that has rows, as NumPy."""
    idx, probabilities = np.asarray(routes.topk_idx), np.asarray(routes.probabilities)
    parts = [(idx[ids == s], probabilities[ids == s]) for s in range(number)]
    return [part for part in parts if (part[0] >= 0).any()]


def test_loss_of_a_rank_and_of_sequences():
    routes = routes_of()
    for number in (1, 2, 4, ROWS):
        ids = np.arange(ROWS) // (ROWS // number)
        expected = np.mean([plain_loss(*part) for part in parts_of(routes, ids, number)])
        got = nn.load_balancing_loss(routes, sequences=number)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        by_ids = nn.load_balancing_loss(routes, sequences=number, sequence_ids=ids)
        np.testing.assert_allclose(by_ids, expected, rtol=1e-5)


def test_loss_of_packed_sequences():
    """Of several lengths, one of them empty; rows with an id outside of all count nowhere."""
    routes = routes_of(1)
    ids = np.array([0] * 5 + [1] * 9 + [3] * 7 + [-1, 4, 9])
    expected = np.mean([plain_loss(*part) for part in parts_of(routes, ids, 4)])
    got = nn.load_balancing_loss(routes, sequences=4, sequence_ids=ids)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("ids", [None, np.arange(ROWS) % 3])
def test_gradient_of_the_loss_is_the_slope(ids):
    """The loss is linear in the probabilities: a finite difference is exact."""
    routes = routes_of(2)

    def loss(probabilities):
        moved = routes._replace(probabilities=probabilities)
        return nn.load_balancing_loss(moved, sequences=3, sequence_ids=ids)

    gradient = jax.grad(loss)(routes.probabilities)
    direction = np.random.default_rng(0).random(gradient.shape).astype(np.float32)
    slope = loss(routes.probabilities + direction) - loss(routes.probabilities)
    np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=1e-4)
    assert not gradient[routes.topk_idx[:, 0] < 0].any(), "of a masked row"


@pytest.mark.parametrize("check_vma", [True, False])
def test_losses_of_the_global_batch_are_those_of_all_rows(check_vma):
    """And so are their gradients, and not the mean over the ranks of losses of their own."""
    ranks = as_many(4, 2)
    routes = routes_of(3, rows=ranks * 6)

    def losses(routes, axes=()):
        return jnp.stack(
            [
                nn.load_balancing_loss(routes, axes=axes),
                nn.load_balancing_loss(routes, sequences=3, axes=axes),
                nn.router_z_loss(routes, axes=axes),
            ]
        )

    sharded = jax.shard_map(
        functools.partial(losses, axes="ep"),
        mesh=ep_mesh(ranks), in_specs=P("ep"), out_specs=P(), check_vma=check_vma,
    )  # fmt: skip

    def total(which, probabilities, logits):
        moved = routes._replace(probabilities=probabilities, logits=logits)
        values = which(moved)
        return values @ jnp.array([1.0, 2.0, 3.0]), values

    def of_all(routes):
        """Sequence i of all ranks is one."""
        idx = jnp.arange(ranks * 6).reshape(ranks, 3, 2).transpose(1, 0, 2).reshape(-1)
        ordered = jax.tree.map(lambda a: a[idx], routes)
        return jnp.stack(
            [
                nn.load_balancing_loss(routes),
                nn.load_balancing_loss(ordered, sequences=3),
                nn.router_z_loss(routes),
            ]
        )

    results = [
        jax.jit(jax.grad(functools.partial(total, which), (0, 1), has_aux=True))(
            routes.probabilities, routes.logits
        )
        for which in (sharded, of_all)
    ]
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    of_ranks = [jax.tree.map(lambda a, r=r: a[r * 6 : r * 6 + 6], routes) for r in range(ranks)]
    own = np.mean([nn.load_balancing_loss(each) for each in of_ranks])
    assert abs(own - results[0][1][0]) > 1e-3


def test_z_loss():
    routes = routes_of(4)
    rows = np.asarray(routes.topk_idx[:, 0] >= 0)
    squares = np.log(np.exp(np.asarray(routes.logits, np.float64)).sum(axis=1)) ** 2
    np.testing.assert_allclose(nn.router_z_loss(routes), squares[rows].mean(), rtol=1e-5)
    none = routes._replace(topk_idx=jnp.full_like(routes.topk_idx, -1))
    assert nn.router_z_loss(none) == 0
    gradient = jax.grad(lambda z: nn.router_z_loss(routes._replace(logits=z)))(routes.logits)
    assert jnp.isfinite(gradient).all() and not gradient[~rows].any()


def plain_quantile_bias(bias, scores, top_k):
    """One step of Su's rule: sorted, expert by expert."""
    rows, experts = scores.shape
    threshold = -np.sort(-(scores + bias), axis=1)[:, top_k]
    wanted = int(np.ceil(rows * top_k / experts))
    new = np.array([np.sort(threshold - scores[:, e])[wanted - 1] for e in range(experts)])
    return new - new.mean()


@pytest.mark.parametrize("how", ["one rank", "all ranks"])
@pytest.mark.parametrize(
    "config",
    [CONFIG, nn.RouterConfig(TOP_K), nn.RouterConfig(TOP_K, softmax="after")],
    ids=["sigmoid", "softmax", "logits"],
)
def test_quantile_balancing(config, how):
    """Each step is the rule of the paper, and a few of them balance a skewed router."""
    ranks = as_many(4, 1)
    mask = np.ones(ROWS * ranks, bool)
    mask[::8] = False
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((mask.size, EXPERTS)) + np.linspace(1.5, -1.5, EXPERTS)
    logits = jnp.asarray(logits, jnp.float32)

    def step(bias, logits, mask, axes=()):
        routes = nn.route(logits, jnp.eye(EXPERTS), config, balance_bias=bias, mask=mask)
        load = jax.lax.psum(nn.expert_load(routes.topk_idx, EXPERTS), axes)
        return nn.quantile_balance_bias(bias, routes, config, axes=axes), load

    if how == "all ranks":
        specs = (P(), P("ep"), P("ep"))
        step = jax.shard_map(
            functools.partial(step, axes=("ep",)),
            mesh=ep_mesh(ranks), in_specs=specs, out_specs=P(),
        )  # fmt: skip
    step = jax.jit(step)

    scores = np.asarray(nn.router.scores_of_choice(logits, config))[mask]
    bias, loads = jnp.zeros(EXPERTS), []
    for _ in range(12):
        expected = plain_quantile_bias(np.asarray(bias), scores, TOP_K)
        bias, load = step(bias, logits, mask)
        np.testing.assert_allclose(bias, expected, atol=2e-6)
        loads.append(load)
    assert loads[0].max() > 1.5 * loads[0].mean()
    assert loads[-1].max() < 1.1 * loads[-1].mean()
    np.testing.assert_array_equal(step(bias, logits, np.zeros_like(mask))[0], bias)


def test_quantile_balancing_of_all_experts_has_nothing_to_do():
    config = nn.RouterConfig(EXPERTS)
    bias = jnp.linspace(0, 1, EXPERTS)
    routes = routes_of(6, config=config)
    np.testing.assert_array_equal(nn.quantile_balance_bias(bias, routes, config), bias)


def test_metrics():
    balanced = {k: float(v) for k, v in nn.load_metrics(jnp.full(EXPERTS, 7)).items()}
    assert balanced == pytest.approx(
        {"max_over_mean": 1, "min_over_mean": 1, "idle_share": 0, "entropy": 1}
    )
    one = {k: float(v) for k, v in nn.load_metrics(jnp.array([0, 9, 0, 0])).items()}
    assert one == {"max_over_mean": 4, "min_over_mean": 0, "idle_share": 0.75, "entropy": 0}
    none = {k: float(v) for k, v in nn.load_metrics(jnp.zeros(4, jnp.int32)).items()}
    assert none == {"max_over_mean": 0, "min_over_mean": 0, "idle_share": 1, "entropy": 0}
    assert float(nn.load_metrics(jnp.array([5]))["entropy"]) == 1
    assert all(v.dtype == jnp.float32 for v in nn.load_metrics(jnp.ones(3)).values())


REFUSED = {
    "rows that are not so many sequences": (
        lambda: nn.load_balancing_loss(routes_of(), sequences=5), ValueError, "24 rows as seq.*=5",
    ),
    "ids of other rows": (
        lambda: nn.load_balancing_loss(routes_of(), sequences=2, sequence_ids=np.zeros(3, int)),
        ValueError, r"sequence_ids\[3\], expected sequence_ids\[24\]",
    ),
    "an axis outside of shard_map": (
        lambda: nn.load_balancing_loss(routes_of(), axes="ep"), ValueError, "axes='ep'.*shard_map",
    ),
    "an axis that is no name": (
        lambda: nn.router_z_loss(routes_of(), axes=0), TypeError, "axes=0, expected the name",
    ),
    "a router with groups": (
        lambda: nn.quantile_balance_bias(
            jnp.zeros(EXPERTS), routes_of(), nn.RouterConfig(2, num_groups=3, groups_kept=2)
        ),
        ValueError, "groups_kept=2 of 3",
    ),
    "a load of nobody": (lambda: nn.load_metrics(jnp.zeros(0)), ValueError, r"load\[0\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        call()
