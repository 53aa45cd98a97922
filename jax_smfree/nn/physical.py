# SPDX-License-Identifier: Apache-2.0
"""Physical experts: redundant copies of the busy ones, so that the ranks are equally busy.

The router chooses among E *logical* experts. The ranks hold P >= E *physical* ones, each a copy of
a logical one, and for dispatch and combine those are all there is: P is ``EpConfig.num_experts``.

    placement = plan_placement(load, num_physical, num_ranks)     on the host, now and then
    physical = move_parameters(logical, None, placement)          when the placement changes
    routes = spread(route(x, weight, config), placement)          in every step, between router
    token = dispatch_send(token, x, routes.topk_idx, ...)         and dispatch

Everything else stays as it is, and so do the outputs.
"""

import dataclasses
import functools
import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jax_smfree._src import arguments
from jax_smfree.nn.router import Routes


@dataclasses.dataclass(frozen=True)
class ExpertPlacement:
    """Which logical expert each physical one is a copy of. Static and hashable.

    Physical expert p is on rank ``p // (P / ranks)``, as ``EpConfig`` has it.

    Attributes:
      logical_of_physical: P ids of logical experts, in which each of 0 .. E - 1 occurs.

    Raises:
      ValueError, TypeError: for an expert without a copy, and what are no ids.

    Example:
      >>> placement = nn.ExpertPlacement((0, 1, 2, 0))
      >>> placement.num_experts, placement.num_physical, placement.physical_of_logical
      (3, 4, ((0, 3), (1,), (2,)))
    """

    logical_of_physical: tuple[int, ...]

    def __post_init__(self) -> None:
        name, field = "ExpertPlacement", "logical_of_physical"
        given = self.logical_of_physical
        if isinstance(given, np.ndarray) and given.ndim == 1:
            given = tuple(given)
        if not isinstance(given, (tuple, list)) or not given:
            raise TypeError(
                f"{name}: got {field}={arguments.shown(given)}, expected a tuple of the logical "
                "expert of each physical one."
            )
        most = len(given) - 1
        ids = tuple(arguments.integer(name, field, each, least=0, most=most) for each in given)
        missing = set(range(max(ids) + 1)) - set(ids)
        if missing:
            raise ValueError(
                f"{name}: got {field} without expert {min(missing)}, expected a copy of each of "
                f"the experts 0 to {max(ids)}."
            )
        object.__setattr__(self, field, ids)

    @property
    def num_experts(self) -> int:
        """E, logical experts: what the router has."""
        return max(self.logical_of_physical) + 1

    @property
    def num_physical(self) -> int:
        """P, what ``EpConfig.num_experts`` is."""
        return len(self.logical_of_physical)

    @property
    def physical_of_logical(self) -> tuple[tuple[int, ...], ...]:
        """The copies of each logical expert, in ascending order."""
        copies: list[list[int]] = [[] for _ in range(self.num_experts)]
        for physical, logical in enumerate(self.logical_of_physical):
            copies[logical].append(physical)
        return tuple(map(tuple, copies))


def plan_placement(
    load: Array,
    num_physical: int,
    num_ranks: int,
    num_nodes: int = 1,
    *,
    num_groups: int | None = None,
) -> ExpertPlacement:
    """A placement under which the ranks have about the same load. On the host, outside of ``jit``.

    Three greedy steps, those of DeepSeek's EPLB (github.com/deepseek-ai/EPLB; DeepSeek-AI,
    "DeepSeek-V3", 2024, arXiv:2412.19437, section 3.4): groups of experts are dealt to the nodes;
    in each node, the expert with the largest load per copy gets the next copy until there are
    enough; the copies are dealt to the ranks of the node. Dealing goes from the largest load to the
    smallest, each to the emptiest node or rank that is not full.

    All copies of an expert are in one node. With ``num_groups`` of a router that keeps some groups
    only, so are the experts of a group, and a row visits few nodes.

    Args:
      load: numbers [E], rows per logical expert, of some recent steps and all ranks.
      num_physical: P, a multiple of ``num_ranks`` and at least E.
      num_ranks: how many ranks the physical experts are split over, in order.
      num_nodes: how many nodes, of ``num_ranks / num_nodes`` ranks each; it divides E, or
        ``num_groups``.
      num_groups: how many groups of neighbouring experts stay together; None: every expert by
        itself.

    Raises:
      ValueError, TypeError: for numbers that do not divide as said above, or a traced load.

    Example:
      >>> nn.plan_placement(np.array([90, 10, 20, 60]), num_physical=6, num_ranks=3)
      ExpertPlacement(logical_of_physical=(0, 2, 0, 1, 3, 3))
    """
    name = "plan_placement"
    loads = _concrete(name, load)
    experts = loads.size
    num_physical = arguments.integer(name, "num_physical", num_physical)
    num_ranks = arguments.integer(name, "num_ranks", num_ranks)
    num_nodes = arguments.integer(name, "num_nodes", num_nodes)
    groups = experts
    if num_groups is not None:
        groups = arguments.integer(name, "num_groups", num_groups)
    if num_physical < experts:
        raise ValueError(
            f"{name}: got num_physical={num_physical} for {experts} experts, expected at least as "
            "many: each needs a copy."
        )
    for what, number, by, divisor in (
        ("num_physical", num_physical, "num_ranks", num_ranks),
        ("num_ranks", num_ranks, "num_nodes", num_nodes),
        (f"{experts} experts,", experts, "num_groups", groups),
        ("experts or groups of them,", groups, "num_nodes", num_nodes),
    ):
        if number % divisor:
            raise ValueError(
                f"{name}: got {what} {number}, expected a multiple of {by}, which is {divisor}."
            )
    members = np.arange(experts).reshape(groups, -1)
    placed: list[int] = []
    for groups_here in _deal(loads[members].sum(axis=1), num_nodes):
        here = members[groups_here].reshape(-1)
        of_copy = _copies(loads[here], num_physical // num_nodes)
        per_copy = loads[here] / np.bincount(of_copy)
        for copies in _deal(per_copy[of_copy], num_ranks // num_nodes):
            placed += here[of_copy[copies]].tolist()
    return ExpertPlacement(tuple(placed))


def _deal(loads: np.ndarray[Any, Any], packs: int) -> list[list[int]]:
    """Things of these loads in equally many per pack, the largest first to the emptiest pack."""
    dealt: list[list[int]] = [[] for _ in range(packs)]
    open_packs = [(0.0, pack) for pack in range(packs)]
    for thing in np.argsort(-loads, kind="stable").tolist():
        total, pack = heapq.heappop(open_packs)
        dealt[pack].append(thing)
        if len(dealt[pack]) < loads.size // packs:
            heapq.heappush(open_packs, (total + float(loads[thing]), pack))
    return dealt


def _copies(loads: np.ndarray[Any, Any], number: int) -> np.ndarray[Any, Any]:
    """The expert of each of so many copies, with the smallest possible largest load of a copy."""
    of_copy = list(range(loads.size))
    waiting = [(-float(load), expert, 1) for expert, load in enumerate(loads)]
    heapq.heapify(waiting)
    while len(of_copy) < number:
        _, expert, copies = heapq.heappop(waiting)
        of_copy.append(expert)
        heapq.heappush(waiting, (-float(loads[expert]) / (copies + 1), expert, copies + 1))
    return np.array(of_copy)


def move_parameters(params: Any, old: ExpertPlacement | None, new: ExpertPlacement | None) -> Any:
    """Parameters of experts, from one placement to another.

    Shapes: a pytree of arrays whose first axis is the experts of ``old`` -> the same with those of
    ``new``. None is the logical experts, [E, ...].
    Sharding: global arrays, outside of ``jax.shard_map``. Outside of ``jax.jit`` every leaf keeps
    its sharding, and each device gathers what it will hold. Under ``jax.jit`` it is the compiler's
    choice, or that of ``out_shardings``.
    Differentiation: gradients of the copies of an expert are summed. So a training step that keeps
    logical parameters and moves them inside of the loss needs nothing else; one that keeps
    physical ones takes the sum of a gradient over the copies from ``jax.linear_transpose`` of this
    function, and moves it back.

    Copies of an expert must be equal: the first one counts.

    Raises:
      ValueError, TypeError: for leaves with another number of experts than ``old`` has, or
        placements of different logical experts.

    Example:
      >>> placement = nn.ExpertPlacement((0, 1, 2, 1))
      >>> nn.move_parameters({"bias": jnp.array([5, 6, 7])}, None, placement)
      {'bias': Array([5, 6, 7, 6], dtype=int32)}
    """
    name = "move_parameters"
    for what, placement in (("old", old), ("new", new)):
        if placement is not None:
            arguments.instance(name, what, placement, ExpertPlacement)
    known = old or new
    if known is None:
        return params
    if old is not None and new is not None and old.num_experts != new.num_experts:
        raise ValueError(
            f"{name}: got placements of {old.num_experts} and of {new.num_experts} logical "
            "experts, expected the same ones."
        )
    experts = known.num_experts
    source = np.arange(experts)
    if old is not None:
        source = np.array([copies[0] for copies in old.physical_of_logical])
    if new is not None:
        source = source[np.array(new.logical_of_physical)]
    size = experts if old is None else old.num_physical
    arguments.tree(name, "params", params)

    def moved(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] != size:
            raise ValueError(
                f"{name}: got an array {list(leaf.shape)} among params, expected [{size}, ...]: "
                "one entry per expert of the old placement."
            )
        return _gather(leaf, source)

    return jax.tree.map(moved, params)


def _gather(leaf: Array, source: np.ndarray[Any, Any]) -> Array:
    """``leaf[source]``, sharded as ``leaf`` is."""
    if isinstance(leaf, jax.core.Tracer):
        return _take(leaf, source)
    sharding = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
    gather: Array = _compiled_gather(tuple(source.tolist()), sharding)(leaf)
    return gather


@functools.lru_cache(maxsize=64)
def _compiled_gather(source: tuple[int, ...], sharding: NamedSharding | None) -> Any:
    index = np.array(source)
    return jax.jit(lambda leaf: _take(leaf, index), out_shardings=sharding)


def _take(leaf: Array, source: np.ndarray[Any, Any]) -> Array:
    """On a mesh with explicit axes a gather along a sharded axis must say where the result is."""
    sharding = jax.typeof(leaf).sharding
    explicit = any(entry is not None for entry in sharding.spec)
    taken: Array = leaf.at[source].get(
        mode="promise_in_bounds", out_sharding=sharding if explicit else None
    )
    return taken


def spread(routes: Routes, placement: ExpertPlacement, *, rank: Array | int = 0) -> Routes:
    """Routes to logical experts as routes to their copies, for dispatch.

    Row t takes copy ``(t + rank) mod copies`` of an expert. -1 stays -1. Only ``topk_idx``
    changes: take losses and `expert_load` from the routes as they were.

    Args:
      routes: from `route`, with ``topk_idx`` [T, K] below E.
      placement: where the copies of the E logical experts are.
      rank: an offset, such as ``jax.lax.axis_index``, so that ranks with few rows do not all begin
        with the first copy. An integer scalar.

    Raises:
      ValueError, TypeError: for routes of another number of experts, and wrong shapes or dtypes.

    Example:
      >>> placement = nn.ExpertPlacement((0, 1, 2, 1))
      >>> routes = nn.balanced_routes(3, num_experts=3, top_k=2)
      >>> routes.topk_idx.tolist(), nn.spread(routes, placement).topk_idx.tolist()
      ([[0, 1], [2, 0], [1, 2]], [[0, 1], [2, 0], [1, 2]])
      >>> nn.spread(routes, placement, rank=1).topk_idx.tolist()
      [[0, 3], [2, 0], [3, 2]]
    """
    name = "spread"
    arguments.instance(name, "routes", routes, Routes, "It is what nn.route returns.")
    arguments.instance(name, "placement", placement, ExpertPlacement)
    experts = placement.num_experts
    idx = arguments.array(name, "routes.topk_idx", routes.topk_idx, ("T", "K"), jnp.integer)
    shape = idx.shape[0], experts
    arguments.array(name, "routes.probabilities", routes.probabilities, shape)
    if isinstance(rank, (int, np.integer)) and not isinstance(rank, bool):
        offset = jnp.int32(arguments.integer(name, "rank", rank, least=0))
    else:
        offset = arguments.array(name, "rank", rank, (), jnp.integer).astype(jnp.int32)
    copies = placement.physical_of_logical
    number = np.array([len(each) for each in copies], np.int32)
    table = np.array([np.resize(each, number.max()) for each in copies], np.int32)

    idx = idx.astype(jnp.int32)
    is_expert = (idx >= 0) & (idx < experts)
    logical = jnp.where(is_expert, idx, 0)
    row = jnp.arange(idx.shape[0], dtype=jnp.int32)[:, None] + offset
    copy = row % jnp.asarray(number)[logical]
    physical = jnp.asarray(table)[logical, copy]
    return routes._replace(topk_idx=jnp.where(is_expert, physical, -1))


def _concrete(where: str, load: Any) -> np.ndarray[Any, Any]:
    """float64 [E]: loads that are known here, finite and not negative."""
    given = arguments.array(where, "load", load, ("E",), jnp.number)
    if isinstance(given, jax.core.Tracer):
        raise TypeError(
            f"{where}: got a traced load, expected an array with values: call it outside of "
            "jax.jit, and pass what it returns to the step as a static value."
        )
    loads = np.asarray(given).astype(np.float64)
    if not loads.size or not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(
            f"{where}: got a load[{loads.size}] that is empty, negative or not finite, expected "
            "the rows of each expert."
        )
    return loads
