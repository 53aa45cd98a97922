# SPDX-License-Identifier: Apache-2.0
"""A dispatch and three combines, forward and backward, as one compiled program per static shape."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
import oracle
from jax_smfree import _native
from support import ep_mesh


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program is compiled for. Routing and values are free."""

    ranks: int
    experts: int
    top_k: int
    tokens: int
    hidden: int
    dtype: str
    alignment: int = 1
    capacity: int | None = None
    wire: int | None = None  # wire_capacity
    overflow: str = "drop"
    unused_tokens: int = 0  # max_tokens beyond those sent
    ranks_per_node: int | None = None  # None: as the hardware is, in direct mode
    direct: bool = False  # in direct mode over several nodes, too
    layout: str = "grouped"
    puts: str = "host"

    def __str__(self) -> str:
        name = f"R{self.ranks}-E{self.experts}-K{self.top_k}-T{self.tokens}-H{self.hidden}"
        name += f"-{self.dtype}-align{self.alignment}"
        name += "" if self.capacity is None else f"-{self.overflow}{self.capacity}"
        name += "" if self.wire is None else f"-wire{self.wire}"
        name += "" if self.ranks_per_node is None else f"-nodes{self.ranks_per_node}"
        name += "-direct" if self.direct else ""
        name += "" if self.layout == "grouped" else f"-{self.layout}"
        return f"{name}-puts" if self.puts == "device" else name

    @property
    def ranks_per_sum(self) -> int:
        """Of how many ranks a combine adds up what they return, before it adds up these sums."""
        return 1 if self.direct else self.ranks_per_node or 1

    @property
    def places(self) -> int:
        """The most ranks that a row goes to."""
        return min(self.top_k, self.ranks)

    def config(self, **more: Any) -> smfree.EpConfig:
        return smfree.EpConfig(
            num_experts=self.experts,
            top_k=self.top_k,
            hidden=self.hidden,
            max_tokens=self.tokens + self.unused_tokens,
            dtype=jnp.dtype(self.dtype),
            expert_alignment=self.alignment,
            layout=self.layout,
            recv_capacity=self.capacity,
            wire_capacity=self.wire,
            overflow=self.overflow,
            ranks_per_node=self.ranks_per_node,
            puts=self.puts,
            mode="direct" if self.ranks_per_sum == 1 else "hierarchical",
            **more,
        )

    def route(self, topk_idx: np.ndarray) -> oracle.Routing:
        """Where the oracle sends every copy."""
        return oracle.route(
            topk_idx, self.experts, recv_capacity=self.capacity, wire_capacity=self.wire,
            alignment=self.alignment, layout=self.layout, ranks_per_node=self.ranks_per_sum,
        )  # fmt: skip

    def as_received(self, config: smfree.EpConfig, rows: Any) -> Any:
        """Arrays [N, ...] as ``d.x`` has them."""
        shape = config.recv_shape(self.tokens, self.ranks)
        return jax.tree.map(lambda v: v.reshape(*shape, *v.shape[1:]), rows)

    def flat(self, rows: Any) -> Any:
        """Arrays as ``d.x`` has them as [N, ...]."""
        leading = 1 if self.layout == "grouped" else 2
        return jax.tree.map(lambda v: v.reshape(-1, *v.shape[leading:]), rows)


@dataclasses.dataclass(frozen=True, repr=False)
class Inputs:
    """Operands and cotangents of all ranks; every array has a leading rank axis.

    The three ``y`` are results of the experts, for a combine with the weights of the dispatch, with
    the weights given in ``weights``, and without weights.
    """

    topk_idx: np.ndarray  # [R, T, K]
    x: np.ndarray  # [R, T, H]
    topk_weights: np.ndarray  # [R, T, K]
    ys: tuple[np.ndarray, np.ndarray, np.ndarray]  # [R, N, H]
    weights: np.ndarray  # [R, N]
    received_ct: np.ndarray  # [R, N, H]
    received_weights_ct: np.ndarray  # [R, N]
    out_cts: tuple[np.ndarray, np.ndarray, np.ndarray]  # [R, T, H]

    def __repr__(self) -> str:
        return f"Inputs(topk_idx={self.topk_idx.tolist()}, ...)"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["d", "outs", "x_ct", "topk_weights_ct", "y_cts", "weights_ct"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What one lane computed, as `Inputs`."""

    d: smfree.DispatchResult
    outs: tuple[Any, Any, Any]
    x_ct: Any
    topk_weights_ct: Any
    y_cts: tuple[Any, Any, Any]
    weights_ct: Any


def native(token, inputs, x, topk_weights, ys, weights):
    d, token = smfree.dispatch(token, x, inputs.topk_idx, topk_weights)
    first, token = smfree.combine(token, d, ys[0])
    second, token = smfree.combine(token, d, ys[1], weights)
    third, token = smfree.combine(token, d, ys[2], None)
    return d, (first, second, third)


def hooks(token, inputs, x, topk_weights, ys, weights):
    send = functools.partial(smfree.combine, return_recv_hook=True)
    d, token = smfree.dispatch(token, x, inputs.topk_idx, topk_weights, return_recv_hook=True)()
    first, token = send(token, d, ys[0])()
    second, token = send(token, d, ys[1], weights)()
    third, token = send(token, d, ys[2], None)()
    return d, (first, second, third)


MODES = (native, hooks)


def everywhere(tree: Any) -> Any:
    """The arrays of a program, whole in each of its processes, with the ranks in their order.

    They are gathered between CPUs, because ranks may share a GPU here and NCCL would refuse; and as
    bytes, because an all-gather of bfloat16 on the CPU changes the bits of NaNs.
    """
    if jax.process_count() == 1:
        return tree
    first_cpus = {d.process_index: d for d in reversed(jax.devices("cpu"))}
    mesh = Mesh([first_cpus[process] for process in range(jax.process_count())], "process")
    gather = jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, P()))

    def whole(array: Any) -> np.ndarray:
        own = np.concatenate([shard.data for shard in array.addressable_shards])
        there = NamedSharding(mesh, P("process"))
        parts = jax.make_array_from_process_local_data(there, own.view(np.uint8))
        return np.asarray(gather(parts)).view(own.dtype)

    return jax.tree.map(whole, tree)


class Program:
    """Runs both modes at once, each on a lane of its own; by default on the backend under test.

    Attributes:
      shape: the `Shape`.
      group: the group; the caller closes it.
    """

    def __init__(self, shape: Shape, platform: str | None = None, **config: Any) -> None:
        mesh = ep_mesh(shape.ranks, platform)
        if shape.puts == "device" and not _native.puts_on_device:
            pytest.skip("this build has no puts by the GPU: no NVSHMEM was there")
        self.shape = shape
        config["num_lanes"] = len(MODES)
        self.group = smfree.EpGroup.create(mesh, config=shape.config(**config))
        spec = P("ep")
        smap = jax.shard_map(self._local, mesh=mesh, in_specs=spec, out_specs=spec)
        self._step = jax.jit(smap)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.group.config.num_recv_rows(self.shape.tokens, self.shape.ranks)

    def __call__(self, inputs: Inputs) -> list[Outputs]:
        """What each mode computed on all ranks, as NumPy arrays; zero where it may be anything."""
        results = jax.tree.map(np.asarray, everywhere(self.run(inputs)))
        return [self._defined(result, self.shape.route(inputs.topk_idx)) for result in results]

    def _defined(self, result: Outputs, routing: oracle.Routing) -> Outputs:
        if self.shape.layout == "grouped":
            return result

        def defined(rows: np.ndarray) -> np.ndarray:
            rows = rows.copy()
            rows[~routing.in_groups] = 0
            return rows

        d = result.d.replace(x=defined(result.d.x), weights=defined(result.d.weights))
        y_cts, weights_ct = map(defined, result.y_cts), defined(result.weights_ct)
        return dataclasses.replace(result, d=d, y_cts=tuple(y_cts), weights_ct=weights_ct)

    def run(self, inputs: Inputs) -> list[Outputs]:
        """What each mode computed, as global arrays."""
        return self._step({f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)})

    def _local(self, fields: dict[str, Any]) -> list[Outputs]:
        inputs = Inputs(**jax.tree.map(lambda a: a[0], fields))
        results = [self._lane(lane, mode, inputs) for lane, mode in enumerate(MODES)]
        return jax.tree.map(lambda a: a[None], results)

    def _lane(self, lane: int, mode: Any, inputs: Inputs) -> Outputs:
        def forward(x, topk_weights, *of_rows):
            of_rows = self.shape.as_received(self.group.config, of_rows)
            d, outs = mode(self.group.token(lane), inputs, x, topk_weights, *of_rows)
            rows, weights = self.shape.flat((d.x, d.weights))
            return (rows, weights, outs), d.replace(x=rows, weights=weights)

        operands = (inputs.x, inputs.topk_weights, inputs.ys, inputs.weights)
        (_, _, outs), pullback, d = jax.vjp(forward, *operands, has_aux=True)
        cts = pullback((inputs.received_ct, inputs.received_weights_ct, inputs.out_cts))
        return Outputs(d, outs, *cts)
