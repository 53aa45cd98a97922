# SPDX-License-Identifier: Apache-2.0
"""Problems, meshes and the MoE block that the tests share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_smfree._src import reference


def ep_mesh(ranks: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:ranks]), ("ep",))


def mesh_of(kind: str) -> Mesh:
    """Meshes that the semantics must not depend on: further axes, their order, explicit axes."""
    devices = np.array(jax.devices()[:8])
    match kind:
        case "ep":
            return Mesh(devices[:4], ("ep",))
        case "data,ep":
            return Mesh(devices.reshape(2, 4), ("data", "ep"))
        case "ep,data":
            return Mesh(devices.reshape(4, 2), ("ep", "data"))
        case "explicit":
            types = (AxisType.Explicit, AxisType.Explicit)
            return Mesh(devices.reshape(2, 4), ("data", "ep"), axis_types=types)
    raise ValueError(kind)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Global arrays of one MoE block; rows are sharded over all axes of the mesh."""

    mesh: Mesh
    x: jax.Array
    topk_idx: jax.Array
    topk_weights: jax.Array
    kernel: jax.Array

    @property
    def rows(self) -> P:
        return P(self.mesh.axis_names)

    @property
    def specs(self) -> tuple[P, ...]:
        return (self.rows, self.rows, self.rows, P())

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        return (self.x, self.topk_idx, self.topk_weights, self.kernel)


def random_routing(rng: np.random.Generator, rows: int, top_k: int, experts: int) -> np.ndarray:
    """[rows, top_k] int32, no expert twice in a row."""
    return np.argsort(rng.random((rows, experts)), axis=1)[:, :top_k].astype(np.int32)


def make_problem(
    mesh: Mesh, *, tokens: int = 6, top_k: int = 2, experts: int = 8, hidden: int = 16,
    dtype: Any = jnp.float32, seed: int = 0, none_fraction: float = 0.2,
) -> Problem:  # fmt: skip
    rng = np.random.default_rng(seed)
    rows = tokens * mesh.size
    topk_idx = random_routing(rng, rows, top_k, experts)
    topk_idx[rng.random(topk_idx.shape) < none_fraction] = -1

    def put(value: np.ndarray, spec: P) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, spec))

    spec = P(mesh.axis_names)
    return Problem(
        mesh,
        put(rng.standard_normal((rows, hidden)).astype(dtype), spec),
        put(topk_idx, spec),
        put(rng.random((rows, top_k)).astype(np.float32), spec),
        put((rng.standard_normal((hidden, hidden)) / hidden**0.5).astype(dtype), P()),
    )


def block(ops: Any, token: Any, x: Any, topk_idx: Any, topk_weights: Any, kernel: Any) -> Any:
    """An MoE block whose experts differ, with compute overlapped on both operations.

    ``ops`` is ``jax_smfree`` or ``jax_smfree._src.reference``.
    """
    token = ops.dispatch_send(token, x, topk_idx, topk_weights)
    token, shared = ops.overlap(token, lambda x, w: jnp.tanh(x @ w), x, kernel)
    d, token = ops.dispatch_recv(token)
    bounds = jnp.cumsum(d.group_sizes)
    expert = jnp.searchsorted(bounds, jnp.arange(d.x.shape[0]), side="right")
    y = jnp.tanh(d.x @ kernel) * (1 + expert[:, None]).astype(d.x.dtype)
    token = ops.combine_send(token, d, y)
    token, more = ops.overlap(token, lambda s, w: jnp.sin(s @ w), shared, kernel)
    out, token = ops.combine_recv(token)
    return token, out + shared + more


def reference_of(group: Any) -> reference.Group:
    """The reference implementation's stand-in for ``group``."""
    return reference.Group(group.axis, group.config)


def assert_trees_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * max(1.0, np.abs(e).max()))
