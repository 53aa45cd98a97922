# SPDX-License-Identifier: Apache-2.0
"""`EpGroup`: the ranks that exchange rows, and what they hold while they do."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_smfree._src import (
    arguments,
    backends,
    bootstrap,
    compat,
    errors,
    group_axis,
    life,
    nodes,
    placement,
    primitives,
    targets,
)
from jax_smfree._src.config import EpConfig
from jax_smfree._src.errors import SmfreeError
from jax_smfree._src.group_key import GroupKey
from jax_smfree._src.reports import Reports
from jax_smfree._src.token import TOKEN_SIZE, Token

_created: collections.Counter[str] = collections.Counter()


class EpGroup(Reports):
    """An expert-parallel group over axes of a mesh; make it with `EpGroup.create`.

    Along every further axis of the mesh each coordinate is a group of its own. A context manager:
    leaving it closes the group, and makes a `SmfreeError` of a JAX error that the group has caused.
    A group that is dropped is closed, too, with a ResourceWarning: when neither it nor a token of
    it is held any more, even if a compiled program of it is.

    Attributes:
      mesh, axis: as given to `create`.
      config: as given to `create`, with what the group chose for ``ranks_per_node`` and ``mode``.
      num_ranks: the size of the axis, or the product of the sizes.

    Example:
      >>> with smfree.EpGroup.create(mesh, axis="ep", config=config) as other:
      ...     other.num_ranks, other.config.mode
      (4, 'direct')
    """

    def __init__(
        self,
        mesh: Mesh,
        axis: group_axis.Axis,
        config: EpConfig,
        fingerprint: str,
        meeting: backends.Meeting,
        backend: backends.Backend,
    ):
        self.mesh = mesh
        self.axis = axis
        self.config = config
        self.num_ranks = group_axis.size(axis, mesh)
        self.token_size = TOKEN_SIZE
        # A number that is the same in all processes and in the next run of the same program, so
        # that compiled programs can be cached and exported. Positive, and exact in an int64.
        digest = hashlib.sha256(f"{fingerprint}/{meeting.ordinal}".encode()).digest()
        self.group_id = int.from_bytes(digest[:7], "big")
        self.key = GroupKey(
            mesh, axis, config, self.num_ranks, self.group_id, backend, weakref.ref(self)
        )
        self._meeting = meeting
        self._life = life.Life(
            f"EpGroup(axis={axis!r}, num_ranks={self.num_ranks})", config.timeout_s
        )
        self._closed = False

    @classmethod
    def create(cls, mesh: Mesh, axis: group_axis.Axis = "ep", *, config: EpConfig) -> EpGroup:
        """Creates the group; collective over all processes of ``mesh``.

        Args:
          mesh: NVIDIA GPUs of one process that reach one another's memory; NVIDIA GPUs of several
            processes with one each, all processes of the job, on one host or several (NVSHMEM); or
            CPU devices of one host, in one process or several. On any other mesh
            (CPU devices of several hosts, TPUs, AMD GPUs) the group is portable: the same
            results by JAX's own collectives, without overlap, and a warning that says why; see
            `backend`. A mesh of devices that one can only compile for
            (``jax.experimental.topologies``) makes a group that only compiles.
          axis: the mesh axis of the group, or a tuple of several. Ranks are numbered row-major
            over them in the order given, so the last axis runs fastest, whatever the order in
            which the mesh has them: ``jax.lax.axis_index(axis)`` is the rank.
          config: sizes and policies, the same in all processes.

        Raises:
          ValueError, TypeError: for an axis that the mesh does not have or that is given twice,
            experts that do not divide over the ranks, nodes that are not equally large and
            contiguous.
          SmfreeError: when a process does not join within ``config.timeout_s``, or joins with
            another mesh or config; when a GPU has too little free memory, or cannot reach another.

        Example:
          >>> grid = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("context", "tp", "expert"))
          >>> axis = ("context", "expert")  # two groups of four ranks, along "tp"
          >>> with smfree.EpGroup.create(grid, axis, config=config) as other:
          ...     other.num_ranks
          4
        """
        if not isinstance(mesh, Mesh):
            raise TypeError(
                f"EpGroup.create: got a {type(mesh).__name__} as mesh, expected a "
                "jax.sharding.Mesh of devices: the group connects them."
            )
        arguments.instance("EpGroup.create", "config", config, EpConfig)
        axis = group_axis.checked_on("EpGroup.create", axis, mesh)
        ranks = group_axis.size(axis, mesh)
        if config.num_experts % ranks:
            raise ValueError(
                f"EpGroup.create: got num_experts={config.num_experts} over {ranks} ranks, "
                "expected a multiple of the number of ranks: each owns the same number of experts."
            )
        most_rows = max(ranks * config.max_tokens, config.num_recv_rows(config.max_tokens, ranks))
        if most_rows >= 2**31:
            raise ValueError(
                f"EpGroup.create: got up to {most_rows} rows on a rank, expected less than 2**31: "
                "rows are numbered by int32. Lower max_tokens or set recv_capacity."
            )
        ids = [device.id for device in mesh.devices.flat]
        fingerprint = f"axis {axis!r} of {dict(mesh.shape)}, devices {ids}, {config}"
        meeting = backends.meet(mesh, fingerprint, _created[fingerprint], config.timeout_s)
        _created[fingerprint] = meeting.ordinal + 1
        replicas = group_axis.replicas(axis, mesh)
        backend = backends.choose(replicas, meeting)
        config = nodes.resolve("EpGroup.create", config, backends.nodes_of_ranks(replicas, meeting))
        group = cls(mesh, axis, config, fingerprint, meeting, backend)
        if backend != "portable":
            targets.register("cpu" if backend == "cpu" else "CUDA")
        if compat.is_compile_only(mesh.devices.flat[0]):
            return group
        with contextlib.ExitStack() as made:
            natives = backends.native_groups(
                made, backend, group.group_id, replicas, config, meeting
            )
            group._life.begin(natives, list(mesh.local_devices))
            made.pop_all()
        weakref.finalize(group, group._life.drop).atexit = False
        return group

    @property
    def backend(self) -> backends.Backend:
        """``"cpu"``, ``"cuda"`` or ``"portable"``; docs/multihost.md says which is chosen where."""
        return self.key.backend

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The axes of the mesh: what a rank sends and receives varies over all of them."""
        return self.key.mesh_axes

    @property
    def token_spec(self) -> PartitionSpec:
        """The partition spec with which a token crosses a ``shard_map`` boundary."""
        return PartitionSpec(self.mesh_axes)

    def token(self, lane: int = 0) -> Token:
        """A token that is ready for the first operation on ``lane``.

        Inside ``jax.shard_map`` it is this rank's; outside it is a global one, which enters a
        ``shard_map`` with the spec `token_spec`. Calls that begin with fresh tokens are ordered by
        their data, or not at all, and need not be. On GPUs each operation in flight takes a set of
        buffers, see ``EpConfig.num_sets``; a token that is threaded through calls bounds these.

        Raises:
          ValueError, TypeError: for a lane outside of ``range(config.num_lanes)``; a closed group.
        """
        self._check_open("EpGroup.token")
        lane = arguments.integer("EpGroup.token", "lane", lane, least=-(2**31))
        if lane not in range(self.config.num_lanes):
            raise ValueError(
                f"EpGroup.token: got lane={lane}, expected 0 to {self.config.num_lanes - 1} "
                f"(EpConfig.num_lanes = {self.config.num_lanes})."
            )
        if compat.manual_axes():
            self.key.check_mesh("EpGroup.token")
            zeros = compat.varying(jnp.zeros((TOKEN_SIZE,), jnp.float32), self.mesh_axes)
            call = primitives.Call(
                self.key, lane, targets.call_site(), 0, carries_slots=False, varying=frozenset()
            )
            (array,) = primitives.token_p.bind(zeros, call=call)
        else:
            shards = int(np.prod([self.mesh.shape[a] for a in self.mesh_axes]))
            sharding = NamedSharding(self.mesh, self.token_spec)
            array = jnp.zeros((shards * TOKEN_SIZE,), jnp.float32, device=sharding)
            array = placement.placed(array, self.mesh, self.token_spec)
        return Token(array, (), self, lane, None)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _check_open(self, where: str) -> None:
        """``where`` names the call that needs the group."""
        if self._closed:
            raise ValueError(
                f"{where}: the EpGroup is closed. Create a new one with EpGroup.create, and keep "
                "it open (it is a context manager) as long as programs use it."
            )

    def close(self, timeout_s: float | None = None) -> None:
        """Ends the group. Not collective.

        Waits for the programs that this process has launched on the group's devices, also for those
        that have not begun. What is still under way after ``timeout_s`` seconds (default:
        ``config.timeout_s``), or half a second after a fault of the group, ends with an error.
        Later uses raise, and `check` goes on to raise what went wrong until now.

        A program over a single device of this process is only waited for if the calling thread has
        launched it, or if it has begun.
        """
        if timeout_s is None:
            timeout_s = self.config.timeout_s
        timeout_s = arguments.seconds("EpGroup.close", "timeout_s", timeout_s)
        self._closed = True
        self._life.end(timeout_s)

    @contextlib.contextmanager
    def pause(self, timeout_s: float = 3600.0) -> Iterator[None]:
        """Inside the ``with`` block a process may take its time: a checkpoint, a long evaluation.

        Outside of it, ranks that wait for a process are patient for ``config.timeout_s`` only.

        Collective over the processes of the mesh. Each enters when the programs that it has
        launched have ended, so that nobody waits for anybody; and all leave together, when the last
        one comes to the end of its block. A process that leaves by an exception does not wait for
        the others.

        Args:
          timeout_s: how long a process waits for the others at the end, in seconds.

        Raises:
          SmfreeError: a process did not come to the end of its block in time, or the group has
            failed, for example because a process died.

        Example:
          >>> with group.pause():  # doctest: +SKIP
          ...     if jax.process_index() == 0:
          ...         save(params)
        """
        self._check_open("EpGroup.pause")
        timeout_s = arguments.seconds("EpGroup.pause", "timeout_s", timeout_s)
        ended = self._life.launched_ended(timeout_s)
        self._raise_fault()
        if not ended:
            raise SmfreeError(
                "EpGroup.pause: programs that this process has launched were still under way after "
                f"{timeout_s:.0f} s. Wait for their results first, or raise timeout_s."
            )
        yield
        meeting, me = self._meeting, jax.process_index()
        if len(meeting.processes) > 1 and me in meeting.processes:
            rendezvous = f"{meeting.rendezvous}/{self.group_id}/pause"
            bootstrap.exchange(
                "EpGroup.pause", rendezvous, "", meeting.processes, me, timeout_s, self._raise_fault
            )

    def _raise_fault(self) -> None:
        fault = self._life.fault()
        if fault:
            raise SmfreeError(fault)

    def __copy__(self) -> EpGroup:
        return self

    def __deepcopy__(self, memo: Any) -> EpGroup:
        """The group itself, also where a module that has it is copied: it stands for devices."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "EpGroup: got a group to pickle, expected data: a group stands for devices, memory and "
            "sockets of this process. Save the arrays of a module, and make the module anew with "
            "EpGroup.create."
        )

    def __enter__(self) -> EpGroup:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, *_: Any
    ) -> None:
        # After an error, or Ctrl-C, nobody waits for results.
        self.close(timeout_s=None if error is None else life.GRACE_S)
        if ours := errors.from_xla(error):
            raise ours from error

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"EpGroup(axis={self.axis!r}, num_ranks={self.num_ranks}{state}, {self.config})"
