# SPDX-License-Identifier: Apache-2.0
"""What is measured on GPUs: shapes with the capacity that their routing needs, and their inputs."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from benchmarks.results import Json
from jax_smfree.bench.cases import AXIS, Inputs, Shape, wire_rows
from jax_smfree.bench.programs import sharded

SHAPES = ("8192x7168:8of256", "4096x7168:8of256", "8192x4096:2of64", "32768x2048:2of128")
SHAPES += ("128x7168:8of256",)
SMOKE_SHAPES = ("64x128:2of8", "32x64:4of16")


@dataclasses.dataclass(frozen=True)
class GpuShape(Shape):
    """A shape whose grouped array holds what its routing needs at the fullest rank."""

    needed: int = 0

    @property
    def capacity(self) -> int:
        return -(-self.needed // 128) * 128

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.itemsize

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.hidden}:{self.top_k}of{self.experts}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the things beside the shapes are, and how often everything is measured.

    A batch is ``calls`` calls back to back, timed as one; ``batches`` of them give the percentiles.
    A traced program runs ``lead_in`` times before the run that counts, so that the GPU has the
    clocks of a working one; this gives one of ``traces`` samples.
    """

    gemm: int = 8192
    copy_bytes: int = 2**29
    expert_width: int = 2048
    calls: int = 20
    batches: int = 5
    slow_calls: int = 2
    traces: int = 20
    lead_in: int = 2


SMOKE = Scale(gemm=64, copy_bytes=2**20, expert_width=32, calls=2, batches=2, traces=2, lead_in=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A shape on devices: global arrays, the ranks one after the other."""

    shape: GpuShape
    mesh: Mesh
    experts: np.ndarray  # int32 [R*T, K], of all rows, in every process
    sent: np.ndarray  # [R, R] rows that each rank sends to each rank
    x: Array  # [R*T, H]
    topk_idx: Array  # int32 [R*T, K]
    topk_weights: Array  # float32 [R*T, K]

    @property
    def inputs(self) -> tuple[Array, Array, Array]:
        return self.x, self.topk_idx, self.topk_weights

    @property
    def logical_bytes(self) -> float:
        """Per rank and direction, its own rows counted: what some other libraries quote."""
        return float(self.sent.sum()) / self.shape.ranks * self.shape.row_bytes

    @property
    def wire_bytes(self) -> float:
        """Per rank and direction, what leaves it."""
        own = np.trace(self.sent) / self.shape.ranks * self.shape.row_bytes
        return self.logical_bytes - float(own)

    @property
    def message_bytes(self) -> int:
        """What one rank sends one other."""
        return int(self.wire_bytes / max(1, self.shape.ranks - 1))

    def describe(self) -> Json:
        return {
            **dataclasses.asdict(self.shape),
            "capacity": self.shape.capacity,
            "wire_bytes": self.wire_bytes,
            "logical_bytes": self.logical_bytes,
            "message_bytes": self.message_bytes,
        }


def make_mesh(ranks: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:ranks]), (AXIS,))


def random_rows(mesh: Mesh, shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Array:
    """bfloat16, made on the devices. Random, because zeros make a GPU faster than it is."""

    def make() -> Array:
        values = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale
        return values.astype(jnp.bfloat16)

    return jax.jit(make, out_shardings=sharded(mesh))()


def sizes_of(text: str) -> tuple[int, int, int, int]:
    """Rows, hidden, top-k and experts of a shape ROWSxHIDDEN:KofEXPERTS."""
    found = re.fullmatch(r"(\d+)x(\d+):(\d+)of(\d+)", text)
    if not found:
        raise ValueError(f"got shape {text!r}, expected ROWSxHIDDEN:KofEXPERTS, as {SHAPES[0]}")
    rows, hidden, top_k, experts = map(int, found.groups())
    return rows, hidden, top_k, experts


def make_case(mesh: Mesh, text: str, seed: int = 0) -> Case:
    """Uniform random routing without repetition, for a shape as `sizes_of` reads it."""
    rows, hidden, top_k, experts = sizes_of(text)
    shape = GpuShape(mesh.size, rows, top_k, experts, hidden, "bfloat16")
    rng = np.random.default_rng(seed)
    total = shape.ranks * rows
    drawn = np.argpartition(rng.random((total, experts), np.float32), top_k - 1, axis=1)
    topk_idx = drawn[:, :top_k].astype(np.int32)
    weights = rng.random((total, top_k), np.float32)
    per_rank = np.bincount(topk_idx.ravel() // shape.local_experts, minlength=shape.ranks)
    shape = dataclasses.replace(shape, needed=int(per_rank.max()))
    sent = wire_rows(shape, Inputs(drawn, topk_idx, weights))

    def put(value: np.ndarray) -> Array:
        # Not device_put, which compares what several processes give it, by NCCL; and NCCL refuses
        # ranks that share a GPU.
        return jax.make_array_from_callback(value.shape, sharded(mesh), value.__getitem__)

    x = random_rows(mesh, (total, hidden), seed)
    return Case(shape, mesh, topk_idx, sent, x, put(topk_idx), put(weights))
