# SPDX-License-Identifier: Apache-2.0
"""`EpConfig`: what all ranks of an expert-parallel group agree on before anything is sent."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from jax_smfree import _native
from jax_smfree._src import arguments
from jax_smfree._src.fp8 import Fp8
from jax_smfree._src.rows import FLOATS

_COUNTS = ("num_experts", "top_k", "hidden", "max_tokens", "expert_alignment", "num_lanes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpConfig:
    """Sizes and policies of an expert-parallel (EP) group.

    Nodes and mode: the ranks of a node reach each other over fast links, those of different nodes
    over a network. In ``"direct"`` mode a row goes to each rank that it needs; in
    ``"hierarchical"`` mode it crosses once to each *node*, where a rank hands it on, and one sum
    per node comes back. The mode is hierarchical if there is more than one node and more than one
    rank in each, else direct; ``mode`` overrides that. ``group.config`` says what was chosen. A
    dispatch has the same bits in both; for the sums of a combine see `combine_recv`.

    Attributes:
      num_experts: experts over all ranks, a multiple of the number of ranks. Rank ``r`` owns the
        experts ``[r * num_experts / ranks, (r + 1) * num_experts / ranks)``.
      top_k: experts per row, the second dimension of ``topk_idx``.
      hidden: length of the longest row, in elements of ``dtype``. An operation may send shorter
        ones, of other dtypes and of several arrays, that take at most ``hidden`` times the bytes of
        ``dtype`` on the wire (each array of a row, and the scales of a quantised one, rounded up to
        16 bytes).
      max_tokens: the most rows that one rank sends in one operation.
      dtype: element type of the longest row: float32, bfloat16, float16, float8_e4m3fn or
        float8_e5m2. Sums are always taken in float32.
      wire: how the rows of a dispatch travel that does not say otherwise: quantised by an `Fp8`, or
        ``None``: as they are. A combine is quantised only where it says so.
      grad_wire: the same for their derivatives.
      recv_capacity: rows of ``d.x``, a multiple of ``expert_alignment``. ``None`` is the worst case
        (every row of every rank comes here), so that nothing is ever dropped; a smaller number
        bounds memory, see ``overflow``.
      wire_capacity: the most rows that a rank receives in one dispatch, before they are spread over
        experts: a row counts once for each rank that sends it here, own rows included. ``None`` is
        ``min(ranks * max_tokens, recv_capacity)``: a row that travels has at least one copy, so
        what does not fit on the wire would not fit into ``d.x`` either.
      expert_alignment: every entry of ``d.group_sizes`` is a multiple of it, filled up with zero
        rows.
      layout: how ``d.x`` has its rows. ``"grouped"``: [N, ...], the groups of the local experts one
        behind the other. ``"padded"``: [E / R, C, ...], what batched matmuls take: C rows for each
        local expert, of which those past ``d.group_sizes`` are unspecified. ``recv_capacity`` is
        then E / R * C; by default C is the worst case, every row of every rank.
      num_lanes: how many operations are meant to overlap (micro-batches). A lane is a name for a
        sequence of operations, which errors and traces show; see `EpGroup.token`.
      num_sets: on GPUs, how many sets of buffers the group has from the beginning, at most 32. Each
        operation in flight takes one, gradients and calls that no data order included. In one
        process ``None`` is one for each lane; compiling a program that takes more makes more, and
        nothing is allocated for one that does not. Over several processes ``None`` is
        ``3 * num_lanes + 2``, or ``num_lanes + 1`` if not ``differentiable`` (in hierarchical mode,
        where sets are large, ``3 * num_lanes`` and ``num_lanes``); compiling a program that takes
        more is an error. It is also how many operations programs may leave in flight for others to
        receive (``None``: as over several processes); one more is an error. Memory grows with the
        number, see `nvl_size_hint`.
      ranks_per_node: how many ranks, one after the other, form a node. ``None`` asks the hardware:
        the GPUs of a host, or the CPU devices of a process; 1 in a direct mode whose ranks are not
        in that order. GPUs of one node exchange rows over NVLink, those of different nodes always
        by NVSHMEM's puts, also where NVLink would reach them.
      mode: ``"direct"`` or ``"hierarchical"``; ``None`` follows the rule above.
      timeout_s: deadline of every wait for a peer, in seconds; at most 1e6, which is eleven days:
        every clock that a deadline is counted on can hold that, also those of 32 bits.
      overflow: when more rows come than ``wire_capacity`` or ``recv_capacity``: ``"error"`` makes
        ``d.x`` and ``d.weights`` NaN and raises in ``group.check()`` (integers have all bits set; a
        row that lost all its copies on a rank comes back as NaN from a combine); ``"drop"`` drops
        in a fixed order. Both count the copies in
        ``d.num_dropped``. First whole rows go, until ``wire_capacity`` are left (those of the last
        rank, and of a rank its last rows, go first; in hierarchical mode each relay first keeps as
        many of what it hands on); then copies that do not fit into ``d.x`` (the last experts, and
        in an expert the last rows, go first; in the padded layout the last rows of each expert that
        has more than fit).
      sm_push_bytes: on GPUs, operations that send up to so many bytes of rows to a peer store them
        there from the pack kernel, which is faster for small ones; larger ones go by copy engine,
        which leaves the SMs to the compute. ``None`` leaves it to the library; 0 is never.
      puts: on GPUs, who starts the puts to other nodes: ``"host"``, a thread of this process, while
        the rows are still being packed; or ``"device"``, a kernel behind the one that packs them,
        for networks that the GPU drives itself (IBGDA); for operations of more than
        ``sm_push_bytes`` it waits until all ranks have begun them. See docs/multihost.md.
      differentiable: whether programs differentiate through the group. By default such a group has
        more buffers on GPUs, see ``num_sets``.

    Raises:
      ValueError, TypeError: for a value outside of what is said above.

    Example:
      >>> config = smfree.EpConfig(num_experts=8, top_k=2, hidden=16, max_tokens=4)
      >>> config.dtype, config.timeout_s
      (dtype(bfloat16), 60.0)
    """

    num_experts: int
    top_k: int
    hidden: int
    max_tokens: int
    dtype: Any = jnp.bfloat16
    wire: Fp8 | None = None
    grad_wire: Fp8 | None = None
    recv_capacity: int | None = None
    wire_capacity: int | None = None
    expert_alignment: int = 1
    layout: Literal["grouped", "padded"] = "grouped"
    num_lanes: int = 1
    num_sets: int | None = None
    ranks_per_node: int | None = None
    mode: Literal["direct", "hierarchical"] | None = None
    timeout_s: float = 60.0
    overflow: Literal["error", "drop"] = "error"
    sm_push_bytes: int | None = None
    puts: Literal["host", "device"] = "host"
    differentiable: bool = True

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("dtype", arguments.dtype("EpConfig", "dtype", self.dtype))
        if self.dtype not in FLOATS:
            raise TypeError(
                f"EpConfig: got dtype={self.dtype}, expected one of "
                f"{', '.join(d.name for d in FLOATS)}. It is the element type of the longest "
                "row; an operation may send rows of other types."
            )
        for name in ("wire", "grad_wire"):
            if getattr(self, name) is not None:
                arguments.instance("EpConfig", name, getattr(self, name), Fp8, "Or None.")
        for name in _COUNTS:
            put(name, arguments.integer("EpConfig", name, getattr(self, name)))
        for name in ("recv_capacity", "wire_capacity", "num_sets", "ranks_per_node"):
            if getattr(self, name) is not None:
                put(name, arguments.integer("EpConfig", name, getattr(self, name)))
        if self.sm_push_bytes is not None:
            most = 2**63 - 1
            value = arguments.integer(
                "EpConfig", "sm_push_bytes", self.sm_push_bytes, least=0, most=most
            )
            put("sm_push_bytes", value)
        put("differentiable", arguments.flag("EpConfig", "differentiable", self.differentiable))
        arguments.choice("EpConfig", "layout", self.layout, ("grouped", "padded"))
        arguments.choice("EpConfig", "mode", self.mode, ("direct", "hierarchical", None))
        arguments.choice("EpConfig", "puts", self.puts, ("host", "device"))
        arguments.choice("EpConfig", "overflow", self.overflow, ("error", "drop"))
        self._check_timeout()
        if self.top_k > self.num_experts:
            raise ValueError(
                f"EpConfig: got top_k={self.top_k} of num_experts={self.num_experts}, expected "
                "top_k <= num_experts: a row goes to an expert at most once."
            )
        capacity, alignment = self.recv_capacity, self.expert_alignment
        if capacity is not None and capacity % alignment:
            below = capacity // alignment * alignment
            fits = f"{below} or {below + alignment}" if below else f"{alignment}"
            raise ValueError(
                f"EpConfig: got recv_capacity={capacity} with expert_alignment={alignment}, "
                "expected a multiple of it, because every group of rows is one, also the last one "
                f"that fits. Set recv_capacity={fits}."
            )

    def _check_timeout(self) -> None:
        most = _native.MAX_TIMEOUT_S
        expected = f"a positive number of seconds of at most {most:,.0f}: every wait has a deadline"
        value = arguments.number("EpConfig", "timeout_s", self.timeout_s, expected)
        if not 0 < value <= most:
            raise ValueError(f"EpConfig: got timeout_s={self.timeout_s!r}, expected {expected}.")
        object.__setattr__(self, "timeout_s", value)

    def num_recv_rows(self, num_tokens: int, num_ranks: int) -> int:
        """Rows of ``d.x``, N, when every rank sends ``num_tokens`` rows.

        ``recv_capacity`` where it is given; else the worst case: every rank sends every row to as
        many experts of this rank as it can, and the rows of every expert are rounded up to
        ``expert_alignment``. In the padded layout every expert has room for every row.
        """
        name = "EpConfig.num_recv_rows"
        tokens = arguments.integer(name, "num_tokens", num_tokens)
        ranks = arguments.integer(name, "num_ranks", num_ranks)
        if self.num_experts % ranks:
            raise ValueError(
                f"{name}: got num_experts={self.num_experts} over {ranks} ranks, expected a "
                "multiple of the number of ranks: each owns the same number of experts."
            )
        local_experts = self.num_experts // ranks
        if self.recv_capacity is not None:
            self._check_parts(self.recv_capacity, local_experts)
            return self.recv_capacity
        # Computed here, because the integers of the layout code might not hold it.
        visited = local_experts if self.layout == "padded" else min(self.top_k, local_experts)
        copies = ranks * tokens * visited
        most = copies + (min(copies, local_experts) + 1) * self.expert_alignment
        if most > arguments.INT32_MAX:
            raise ValueError(
                f"{name}: got up to {most} rows on a rank, expected less than 2**31: rows are "
                "numbered by int32. Lower max_tokens or set recv_capacity."
            )
        return _native.rows_capacity(self._native(ranks), tokens)

    def _check_parts(self, recv_capacity: int, local_experts: int) -> None:
        multiple = local_experts * self.expert_alignment
        if self.layout == "padded" and recv_capacity % multiple:
            up = -(-recv_capacity // multiple) * multiple
            raise ValueError(
                f"EpConfig: got recv_capacity={recv_capacity} with layout='padded' and "
                f"{local_experts} experts on each rank, expected a multiple of {multiple}: each "
                f"has an equal part, a multiple of expert_alignment={self.expert_alignment}. Set "
                f"recv_capacity={up}."
            )

    def recv_shape(self, num_tokens: int, num_ranks: int) -> tuple[int, ...]:
        """The first sizes of ``d.x`` when every rank sends ``num_tokens`` rows.

        (N,), or (E / R, C) in the padded layout.
        """
        rows = self.num_recv_rows(num_tokens, num_ranks)
        if self.layout == "grouped":
            return (rows,)
        local_experts = self.num_experts // num_ranks
        return (local_experts, rows // local_experts)

    def num_wire_rows(self, num_tokens: int, num_ranks: int) -> int:
        """The most rows that a rank receives, and keeps, when every rank sends ``num_tokens`` rows.

        All of them, or ``wire_capacity`` (with its default) if that is less.
        """
        name = "EpConfig.num_wire_rows"
        native = self._native(arguments.integer(name, "num_ranks", num_ranks))
        return _native.wire_rows(native, arguments.integer(name, "num_tokens", num_tokens))

    def _native(self, num_ranks: int) -> _native.GroupConfig:
        """What decides over numbers of rows."""
        native = _native.GroupConfig()
        native.num_ranks = num_ranks
        for name in ("num_experts", "top_k", "max_tokens", "expert_alignment"):
            setattr(native, name, getattr(self, name))
        native.recv_capacity = self.recv_capacity or 0
        native.wire_capacity = self.wire_capacity or 0
        native.padded_groups = self.layout == "padded"
        return native
