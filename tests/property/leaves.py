# SPDX-License-Identifier: Apache-2.0
"""Rows of several arrays of any kind: a program of every operation that takes them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
import oracle
from property.round_trip import Shape, everywhere
from support import ep_mesh

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the rows of a program are, and how they travel.

    ``sent`` and ``returned``: name, trailing shape and dtype of the arrays of a dispatch and of a
    combine.
    """

    shape: Shape
    sent: tuple[tuple[str, tuple[int, ...], str], ...]
    returned: tuple[tuple[str, tuple[int, ...], str], ...]
    wire: smfree.Fp8 | None = None
    grad_wire: smfree.Fp8 | None = None

    def __str__(self) -> str:
        def named(arrays: Any) -> str:
            return "+".join(f"{'x'.join(map(str, shape))}{dtype}" for _, shape, dtype in arrays)

        def wired(wire: smfree.Fp8 | None) -> str:
            power = "p" if wire and wire.power_of_two else ""
            return f"-{wire.dtype.name}/{wire.block}{power}" if wire else ""

        name = f"{self.shape}-{named(self.sent)}-{named(self.returned)}"
        return name + wired(self.wire) + wired(self.grad_wire)

    def floats(self, x: Arrays) -> Arrays:
        """Those that have gradients."""
        return {n: x[n] for n, _, dtype in self.sent if jnp.issubdtype(dtype, jnp.floating)}


@dataclasses.dataclass(frozen=True, repr=False)
class Inputs:
    """Operands and cotangents of all ranks, with a leading rank axis."""

    topk_idx: np.ndarray  # [R, T, K]
    topk_weights: np.ndarray  # [R, T, K]
    capacity: np.ndarray  # [R]
    x: Arrays  # [R, T, ...]
    y: Arrays  # [R, N, ...]
    add: Arrays  # [R, T, ...]
    received_ct: Arrays  # [R, N, ...]
    out_ct: Arrays  # [R, T, ...]

    def __repr__(self) -> str:
        return f"Inputs(topk_idx={self.topk_idx.tolist()}, capacity={self.capacity.tolist()}, ...)"


class Program:
    """A dispatch, another one along its handle, and a combine that adds; with gradients."""

    def __init__(self, kind: Kind) -> None:
        shape = kind.shape
        self.kind, mesh = kind, ep_mesh(shape.ranks)
        self.group = smfree.EpGroup.create(mesh, config=shape.config())
        spec = P("ep")
        self._step = jax.jit(jax.shard_map(self._local, mesh=mesh, in_specs=spec, out_specs=spec))

    @property
    def num_rows(self) -> int:
        """N."""
        shape = self.kind.shape
        return self.group.config.num_recv_rows(shape.tokens, shape.ranks)

    def __call__(self, inputs: Inputs) -> dict[str, Any]:
        """What all ranks computed, as NumPy arrays."""
        fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
        return jax.tree.map(np.asarray, everywhere(self._step(fields)))

    def _local(self, fields: dict[str, Any]) -> dict[str, Any]:
        inputs = Inputs(**jax.tree.map(lambda a: a[0], fields))
        how = {"wire": self.kind.wire, "grad_wire": self.kind.grad_wire}

        def forward(floats, weights, y, add):
            x, y = inputs.x | floats, self.kind.shape.as_received(self.group.config, y)
            token = smfree.dispatch_send(self.group.token(), x, inputs.topk_idx, weights, **how)
            d, token = smfree.dispatch_recv(token, capacity=inputs.capacity)
            again, token = smfree.dispatch(token, x, None, weights, routing=d.handle, **how)
            alone, token = smfree.dispatch(token, inputs.x, routing=d.handle, **how)
            out, token = smfree.combine(token, d, y, add=add, **how)
            flat = self.kind.shape.flat
            received = {
                name: d.replace(x=flat(d.x), weights=flat(d.weights))
                for name, d in {"d": d, "again": again, "alone": alone}.items()
            }
            received["local_expert"] = flat(d.local_expert)
            return (self.kind.floats(received["d"].x), out), received

        floats = self.kind.floats(inputs.x)
        operands = (floats, inputs.topk_weights, inputs.y, inputs.add)
        (_, out), pullback, received = jax.vjp(forward, *operands, has_aux=True)
        x_ct, weights_ct, y_ct, add_ct = pullback((inputs.received_ct, inputs.out_ct))
        results = received | {
            "out": out, "x_ct": x_ct, "topk_weights_ct": weights_ct, "y_ct": y_ct, "add_ct": add_ct,
        }  # fmt: skip
        return jax.tree.map(lambda a: a[None], results)


def route(kind: Kind, inputs: Inputs) -> oracle.Routing:
    """Where the oracle sends every copy."""
    shape = kind.shape
    return oracle.route(
        inputs.topk_idx, shape.experts, recv_capacity=shape.capacity, wire_capacity=shape.wire,
        alignment=shape.alignment, capacity=inputs.capacity, layout=shape.layout,
        ranks_per_node=shape.ranks_per_sum,
    )  # fmt: skip


def random_inputs(
    rng: np.random.Generator, kind: Kind, num_rows: int, topk_idx: np.ndarray, capacity: np.ndarray
) -> Inputs:
    """Values for a routing."""
    ranks, tokens, top_k = topk_idx.shape

    def array(size: tuple[int, ...], dtype: Any) -> np.ndarray:
        dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            if dtype.kind == "b":
                return rng.random(size) < 0.5
            return rng.integers(0, 256, (*size, dtype.itemsize), np.uint8).view(dtype)[..., 0]
        # Numbers of very different sizes, but none that is lost in eight bits without notice.
        values = rng.standard_normal(size) * 2.0 ** rng.integers(-3, 4, size)
        values[rng.random(size) < 0.05] = 0.0
        values[rng.random(size) < 0.05] = -0.0
        return values.astype(dtype)

    def arrays(rows: int, of: Any) -> Arrays:
        return {name: array((ranks, rows, *shape), dtype) for name, shape, dtype in of}

    received_ct = kind.floats(arrays(num_rows, kind.sent))
    return Inputs(
        topk_idx=topk_idx,
        topk_weights=array((ranks, tokens, top_k), np.float32),
        capacity=capacity,
        x=arrays(tokens, kind.sent),
        y=arrays(num_rows, kind.returned),
        add=arrays(tokens, kind.returned),
        received_ct=received_ct,
        out_ct=arrays(tokens, kind.returned),
    )
