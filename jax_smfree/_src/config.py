# SPDX-License-Identifier: Apache-2.0
"""`EpConfig`: what all ranks of an expert-parallel group agree on before anything is sent."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_smfree import _native
from jax_smfree._src import arguments

_DTYPES = tuple(np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16))
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
      hidden: length of a row, in elements.
      max_tokens: the most rows that one rank sends in one operation.
      dtype: of the rows: float32, bfloat16 or float16. Sums are always taken in float32.
      recv_capacity: rows of ``d.x``, a multiple of ``expert_alignment``. ``None`` is the worst case
        (every row of every rank comes here), so that nothing is ever dropped; a smaller number
        bounds memory, see ``overflow``.
      expert_alignment: every entry of ``d.group_sizes`` is a multiple of it, filled up with zero
        rows.
      num_lanes: operations that may be in flight at the same time (micro-batches).
      ranks_per_node: how many ranks, one after the other, form a node. ``None`` asks the hardware:
        the GPUs of a host, or the CPU devices of a process; 1 in a direct mode whose ranks are not
        in that order. GPUs of one node exchange rows over NVLink, those of different nodes always
        by NVSHMEM's puts, also where NVLink would reach them.
      mode: ``"direct"`` or ``"hierarchical"``; ``None`` follows the rule above.
      timeout_s: deadline of every wait for a peer, in seconds; at most 1e6, which is eleven days:
        every clock that a deadline is counted on can hold that, also those of 32 bits.
      overflow: when more rows arrive than ``recv_capacity``: ``"error"`` poisons the outputs with
        NaN and raises in ``group.check()``; ``"drop"`` drops in a fixed order (the last experts,
        and in an expert the last rows, go first) and counts ``d.num_dropped``.
      sm_push_bytes: on GPUs, operations that send up to so many bytes of rows to a peer store them
        there from the pack kernel, which is faster for small ones; larger ones go by copy engine,
        which leaves the SMs to the compute. ``None`` leaves it to the library; 0 is never.
      puts: on GPUs, who starts the puts to other nodes: ``"host"``, a thread of this process, while
        the rows are still being packed; or ``"device"``, a kernel behind the one that packs them,
        for networks that the GPU drives itself (IBGDA). See docs/multihost.md.
      differentiable: whether the group takes part in differentiation, which needs buffers of its
        own for the operations of the backward pass.

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
    recv_capacity: int | None = None
    expert_alignment: int = 1
    num_lanes: int = 1
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
        if self.dtype not in _DTYPES:
            raise TypeError(
                f"EpConfig: got dtype={self.dtype}, expected one of "
                f"{', '.join(d.name for d in _DTYPES)}. Cast the rows, or quantise them yourself."
            )
        for name in _COUNTS:
            put(name, arguments.integer("EpConfig", name, getattr(self, name)))
        for name in ("recv_capacity", "ranks_per_node"):
            if getattr(self, name) is not None:
                put(name, arguments.integer("EpConfig", name, getattr(self, name)))
        if self.sm_push_bytes is not None:
            most = 2**63 - 1
            value = arguments.integer(
                "EpConfig", "sm_push_bytes", self.sm_push_bytes, least=0, most=most
            )
            put("sm_push_bytes", value)
        put("differentiable", arguments.flag("EpConfig", "differentiable", self.differentiable))
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
        """Rows of ``d.x`` when every rank sends ``num_tokens`` rows.

        ``recv_capacity`` where it is given; else the worst case: every rank sends every row to as
        many experts of this rank as it can, and the rows of every expert are rounded up to
        ``expert_alignment``.
        """
        name = "EpConfig.num_recv_rows"
        tokens = arguments.integer(name, "num_tokens", num_tokens)
        ranks = arguments.integer(name, "num_ranks", num_ranks)
        if self.num_experts % ranks:
            raise ValueError(
                f"{name}: got num_experts={self.num_experts} over {ranks} ranks, expected a "
                "multiple of the number of ranks: each owns the same number of experts."
            )
        if self.recv_capacity is not None:
            return self.recv_capacity
        local_experts = self.num_experts // ranks
        # Of Python's integers, which the ones of the layout code might not hold.
        copies = ranks * tokens * min(self.top_k, local_experts)
        most = copies + (min(copies, local_experts) + 1) * self.expert_alignment
        if most > arguments.INT32_MAX:
            raise ValueError(
                f"{name}: got up to {most} rows on a rank, expected less than 2**31: rows are "
                "numbered by int32. Lower max_tokens or set recv_capacity."
            )
        return _native.max_recv_rows(
            ranks, tokens, self.top_k, local_experts, self.expert_alignment
        )
