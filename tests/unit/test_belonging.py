# SPDX-License-Identifier: Apache-2.0
"""A group serves its own mesh, its own devices, its own results; others are refused by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from support import as_many, backend, devices, ep_mesh, make_problem

CONFIG = {"num_experts": 8, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": jnp.float32}


@pytest.mark.cpu_only
def test_handle_of_a_group_in_the_other_mode(groups):
    mesh = ep_mesh(4)
    direct, hierarchical = groups(mesh, **CONFIG), groups(mesh, **CONFIG, ranks_per_node=2)
    problem = make_problem(mesh)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=problem.specs[:3], out_specs=problem.rows)
    def step(x, idx, weights):
        d, _ = smfree.dispatch(direct.token(), x, idx, weights)
        return smfree.combine(hierarchical.token(), d, d.x)[0]

    with pytest.raises(ValueError, match=r"another group.*mode='direct' instead of 'hier"):
        jax.eval_shape(step, *problem.arrays[:3])


def round_trip(group, mesh, axes):
    """``(x, idx) -> x summed over its experts``, over ``mesh``, to be lowered."""

    def local(x, idx):
        d, token = smfree.dispatch(group.token(), x, idx)
        return smfree.combine(token, d, d.x)[0]

    rows = P(axes)
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows))
    shapes = (6 * mesh.size, 16), (6 * mesh.size, 2)
    operands = [
        jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32, jnp.int32), strict=True)
    ]
    return lambda: step.lower(*operands)


OTHER_MESHES = {
    "further axis": (
        lambda of: Mesh(of.reshape(2, -1), ("dp", "ep")),
        r"mesh of {'dp': 2, 'ep': \d}, expected .* {'ep': \d}: .* copies along \['dp'\]",
    ),
    "further axis of one": (
        lambda of: Mesh(of.reshape(1, -1), ("dp", "ep")), r"copies along \['dp'\]",
    ),
    "other size": (
        lambda of: Mesh(of[: of.size // 2], ("ep",)),
        r"mesh of {'ep': \d}, expected the mesh of the group, {'ep': \d}\. Make the group on",
    ),
    "other names": (
        lambda of: Mesh(of, ("x",)), r"mesh of {'x': \d}, expected the mesh of the group, {'ep':",
    ),
    "other order": (
        lambda of: Mesh(of[::-1], ("ep",)),
        r"in local is compiled for the devices \[\d.*, 0\] .* in their order, \[0, 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MESHES)
def test_other_meshes(groups, name):
    other, match = OTHER_MESHES[name]
    of = devices(as_many(4, at_least=2))
    group, mesh = groups(Mesh(of, ("ep",)), **CONFIG), other(of)
    with pytest.raises(ValueError, match=match):
        round_trip(group, mesh, mesh.axis_names)()


def test_the_same_devices_at_the_same_coordinates_are_the_same_mesh(groups):
    """The order of the axes is not the order of the devices; a mesh made twice is one."""
    grid = devices(as_many(8, at_least=2)).reshape(2, -1)
    group = groups(Mesh(grid, ("data", "ep")), **CONFIG)
    axes = ("data", "ep")
    first, second, turned = (
        round_trip(group, mesh, axes)().compile()
        for mesh in (group.mesh, Mesh(grid, axes), Mesh(grid.T, axes[::-1]))
    )
    rows = 6 * grid.size
    x = np.arange(rows * 16, dtype=np.float32).reshape(rows, 16)
    idx = (np.arange(rows)[:, None] + np.arange(2)).astype(np.int32) % 8
    for step in (first, second, turned):
        operands = jax.device_put((x, idx), step.input_shardings[0])
        np.testing.assert_array_equal(step(*operands), 2 * x)


def test_a_result_of_another_group(groups):
    grid = devices(as_many(4, at_least=2)).reshape(2, -1)
    mesh = Mesh(grid, ("a", "b"))
    one, other, twin = (
        groups(mesh, "a", **CONFIG),
        groups(mesh, "b", **CONFIG),
        groups(mesh, "a", **CONFIG),
    )

    def combined(dispatching, combining):
        def local(x, idx):
            d, _ = smfree.dispatch(dispatching.token(), x, idx)
            return smfree.combine(combining.token(), d, d.x)[0]

        rows = P(mesh.axis_names)
        return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows)

    operands = jnp.zeros((6 * grid.size, 16)), jnp.zeros((6 * grid.size, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"another group than .*: axis='a' instead of 'b'.*pass a"):
        jax.eval_shape(combined(one, other), *operands)
    with pytest.raises(ValueError, match=r"another group than .*another EpGroup\.create"):
        jax.eval_shape(combined(one, twin), *operands)
    jax.eval_shape(combined(one, one), *operands)


@dataclasses.dataclass(frozen=True)
class OtherDevice:
    """What JAX says of a device that this machine need not have, and only compiles for."""

    platform: str
    device_kind: str
    platform_version: str
    id: int = 0
    process_index: int = 0

    @property
    def client(self):
        return CompileOnlyClient(self.platform_version)


@dataclasses.dataclass(frozen=True)
class CompileOnlyClient:
    platform_version: str


@pytest.mark.parametrize(
    "device",
    [
        OtherDevice("tpu", "TPU v5 lite", "PJRT C API\nTFRT TPU v5 lite"),
        OtherDevice("gpu", "AMD Instinct MI300X", "PJRT C API\nrocm 70001"),
    ],
    ids=lambda device: device.device_kind,
)
def test_devices_of_others(device):
    """The group is portable, and says why to the line that made it."""
    mesh = Mesh(np.array([device]), ("ep",))
    why = rf"{device.device_kind} \(platform '{device.platform}'\).*NVIDIA.*is portable"
    with pytest.warns(UserWarning, match=why) as told:
        group = smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG))
    assert [warning.filename for warning in told] == [__file__]
    assert group.backend == "portable"


def test_the_backend_of_devices_with_one(groups):
    assert groups(ep_mesh(as_many(2)), **CONFIG).backend == backend()
