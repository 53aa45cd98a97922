# SPDX-License-Identifier: Apache-2.0
"""`predict`: memory and times of one configuration on one machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from jax_smfree._src import arguments, nodes
from jax_smfree._src.config import EpConfig
from jax_smfree._src.hints import buffer_bytes
from jax_smfree._src.rows import Leaf, stride
from jax_smfree.plan import traffic
from jax_smfree.plan.machine import PHASES, Machine
from jax_smfree.plan.routing import Routing

Mode = Literal["direct", "hierarchical"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one rank holds and does, the busiest one where they differ.

    Attributes:
      ranks: how many the group has.
      mode: ``"direct"``: each rank sends to each. ``"hierarchical"``: once to each node, which
        forwards; of what it says of GPUs only the bytes were compared with a measurement.
      buffer_bytes: memory that the group's buffers take.
      network_bytes, nvlink_bytes: what a dispatch moves over each link, in the busier direction.
      phase_us: time on the SMs, by phase.
      wire_us: time that a dispatch is on its way while the SMs are free. A combine takes as long,
        unless the rows of a dispatch are quantised (``config.wire``).
      forward_us: time of the forwarding inside the node, of a dispatch or a combine, for which a
        phase waits; 0 in direct mode.
      hiding_gflop: matrix products that last as long as ``wire_us``.
      hiding_width: F of a SwiGLU MLP, the shared expert, that lasts as long as ``wire_us``.
    """

    ranks: int
    mode: Mode
    buffer_bytes: int
    network_bytes: float
    nvlink_bytes: float
    phase_us: dict[str, float]
    wire_us: float
    forward_us: float
    hiding_gflop: float
    hiding_width: float

    @property
    def sm_us(self) -> float:
        """Time of all four phases, which stays on the SMs however much compute hides."""
        return sum(self.phase_us.values())

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {**dataclasses.asdict(self), "sm_us": self.sm_us}


def predict(
    config: EpConfig,
    num_ranks: int,
    machine: Machine | None = None,
    *,
    routing: Routing | None = None,
) -> Prediction:
    """Predicts memory and times of a dispatch and a combine of ``max_tokens`` rows per rank.

    Args:
      config: sizes and mode; ``ranks_per_node`` is how many GPUs NVLink connects, ``None`` all.
      num_ranks: a multiple of ``ranks_per_node``, and a divisor of ``num_experts``.
      machine: rates; by default those of an H200.
      routing: uniform by default.

    Raises:
      ValueError, TypeError: for ranks that do not divide, ``mode="hierarchical"`` where there are
        not several nodes of several ranks, a routing of other experts.

    Example:
      >>> config = smfree.EpConfig(num_experts=256, top_k=8, hidden=7168, max_tokens=8192)
      >>> prediction = plan.predict(config, num_ranks=2)
      >>> round(prediction.sm_us), round(prediction.wire_us)  # measured: 951 for the first
      (964, 310)
    """
    bytes_of_buffers = buffer_bytes(config, num_ranks)
    if machine is None:
        machine = Machine()
    if routing is None:
        routing = Routing(config.num_experts, config.top_k)
    arguments.instance("predict", "machine", machine, Machine)
    arguments.instance("predict", "routing", routing, Routing)
    if (routing.num_experts, routing.top_k) != (config.num_experts, config.top_k):
        raise ValueError(
            f"predict: got a routing of top_k={routing.top_k} of {routing.num_experts} experts, "
            f"expected that of the config, {config.top_k} of {config.num_experts}."
        )
    config = nodes.resolve("predict", config, [[0] * num_ranks])
    assert config.mode is not None and config.ranks_per_node is not None
    direct = config.mode == "direct"
    moves = traffic.direct if direct else traffic.hierarchical
    moved = moves(routing, config.max_tokens, num_ranks, config.ranks_per_node)
    row = Leaf(config.hidden, config.dtype)
    row_bytes, wire_bytes = stride([row], None), stride([row], config.wire)
    network_us = moved.network * wire_bytes / machine.network_gb_s / 1e3
    nvlink_us = moved.nvlink * wire_bytes / machine.nvlink_gb_s / 1e3
    wire_us = max(network_us, nvlink_us) if direct else network_us
    hiding_flop = wire_us * machine.matmul_tflop_s * 1e6
    return Prediction(
        ranks=num_ranks,
        mode=config.mode,
        buffer_bytes=bytes_of_buffers,
        network_bytes=moved.network * wire_bytes,
        nvlink_bytes=moved.nvlink * wire_bytes,
        phase_us={
            name: machine.phase_us(name, num_bytes)
            for name, num_bytes in zip(
                PHASES, _phase_bytes(config.max_tokens, moved, row_bytes, wire_bytes), strict=True
            )
        },
        wire_us=wire_us,
        forward_us=0.0 if direct else nvlink_us,
        hiding_gflop=hiding_flop / 1e9,
        hiding_width=hiding_flop / (6 * config.max_tokens * config.hidden),
    )


def sweep(
    config: EpConfig,
    ranks: Iterable[int],
    machine: Machine | None = None,
    *,
    routing: Routing | None = None,
) -> list[Prediction]:
    """`predict` for several numbers of ranks: direct, and hierarchical where that is a mode.

    A group of fewer ranks than ``config.ranks_per_node`` is one node.

    Raises:
      ValueError, TypeError: as `predict`.

    Example:
      >>> config = dataclasses.replace(config, ranks_per_node=2)
      >>> [(p.ranks, p.mode) for p in plan.sweep(config, [2, 4])]
      [(2, 'direct'), (4, 'direct'), (4, 'hierarchical')]
    """
    arguments.instance("sweep", "config", config, EpConfig)
    try:
        numbers = list(ranks)
    except TypeError as error:
        raise TypeError(
            f"sweep: got ranks={arguments.shown(ranks)}, expected several numbers: [2, 4, 8]."
        ) from error
    found = []
    for each in numbers:
        number = arguments.integer("sweep", "ranks", each, most=arguments.MOST_RANKS)
        per_node = min(config.ranks_per_node or number, number)
        modes: tuple[Mode, ...] = ("direct", "hierarchical")
        for mode in modes if 1 < per_node < number else modes[:1]:
            sized = dataclasses.replace(config, ranks_per_node=per_node, mode=mode)
            found.append(predict(sized, number, machine, routing=routing))
    return found


def _phase_bytes(
    rows: int, moved: traffic.Traffic, row_bytes: int, wire_bytes: int
) -> tuple[float, float, float, float]:
    """Read plus written by each phase; docs/performance.md has the table.

    ``wire_bytes`` is a row of a dispatch on its way. A forwarded row is read and written once more,
    and read where it arrives.
    """
    arrived = moved.forwarded or moved.received
    forwarding = moved.received + moved.forwarded if moved.forwarded else 0.0
    return (
        rows * row_bytes + moved.sent * wire_bytes,
        (forwarding + arrived) * wire_bytes + moved.copies * row_bytes,
        (moved.copies + arrived + forwarding) * row_bytes,
        (moved.sent + rows) * row_bytes,
    )
