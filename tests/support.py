# SPDX-License-Identifier: Apache-2.0
"""Backends, meshes, problems and the MoE block that the tests share."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_smfree._src import backends, reference
from jax_smfree.testing import chaos

IN_NODES = {"ranks_per_node": 2}
PORTABLE = {"backend": "portable"}


def _with_groups(**kinds: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("groups", kinds.values(), ids=kinds.keys(), indirect=True)


in_both_modes = _with_groups(direct={}, hierarchical=IN_NODES)
"""Runs a test with groups of one node, and of nodes of two ranks."""
portable_too = _with_groups(direct={}, portable=PORTABLE)
"""Runs a test with groups of the backend under test, and with portable ones on its devices."""
in_all_kinds = _with_groups(direct={}, hierarchical=IN_NODES, portable=PORTABLE)
"""Runs a test with all three."""


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Groups that are made meanwhile are portable, on a mesh that has a better backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "choose", lambda *_: "portable")
        yield


def backend() -> str:
    """``"cpu"`` or ``"cuda"``, as ``--backend`` says, in the processes that tests start too."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def devices(number: int, platform: str | None = None) -> np.ndarray:
    """The first ``number`` devices, by default of the backend under test; skips if it has fewer."""
    found = jax.devices(platform)
    if len(found) < number:
        pytest.skip(f"needs {number} devices, found {len(found)} of {found[0].device_kind}")
    return np.array(found[:number])


def as_many(at_most: int, at_least: int = 1) -> int:
    """The number of ranks for a test to which it does not matter; ``at_most`` on the CPU.

    On GPUs as many as there are: 1, 2, 4 or 8, so that experts divide over them.
    """
    devices(at_least)
    return max(n for n in (1, 2, 4, 8) if n <= min(at_most, len(jax.devices())))


def ep_mesh(ranks: int, platform: str | None = None) -> Mesh:
    return Mesh(devices(ranks, platform), ("ep",))


def mesh_of(kind: str) -> Mesh:
    """Meshes that the semantics must not depend on: further axes, their order, explicit axes."""
    number = as_many(8)
    data = 2 if number >= 4 else 1
    grid = devices(number).reshape(data, -1)
    match kind:
        case "ep":
            return ep_mesh(as_many(4))
        case "data,ep":
            return Mesh(grid, ("data", "ep"))
        case "ep,data":
            return Mesh(grid.reshape(-1, data), ("ep", "data"))
        case "explicit":
            return Mesh(grid, ("data", "ep"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    raise ValueError(kind)


def x64() -> Any:
    """64 bits as the default, whatever JAX calls it."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


def chaos_on_cpu(group: Any, **options: Any) -> Any:
    """`chaos` where the mover is a thread of ours; copy engines and collectives take no orders."""
    return chaos(group, **options) if group.backend == "cpu" else contextlib.nullcontext()


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
        # Not device_put, which compares what several processes give it, by NCCL on GPUs; and NCCL
        # refuses ranks that share one.
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

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
    expert = jnp.sum(jnp.arange(d.x.shape[0])[:, None] >= bounds, axis=1)
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
