# SPDX-License-Identifier: Apache-2.0
"""What an `EpGroup` reports: faults, counters, memory, and the times of phases and copies."""

from __future__ import annotations

import collections
from typing import Any

from jax_smfree._src import backends
from jax_smfree._src.errors import SmfreeError
from jax_smfree._src.life import Life


class Reports:
    """The methods of `EpGroup` that report; all of them ask its native groups."""

    _life: Life

    def check(self) -> None:
        """Raises what went wrong in this group since the last call, if anything did.

        A missed deadline, a lost peer or ranks that disagree leave the group unusable: close it.
        An overflow of ``wire_capacity`` or ``recv_capacity`` is reported once, and the group goes
        on.

        Costs some microseconds: it looks at host memory, and waits neither for the devices nor for
        other processes. So it sees what has run by then; to see all, wait for the results first.
        Call it once per step or per logging interval. In a portable group it sees overflows and
        wrong routings on the ranks of this process; of anything else JAX tells, or nobody.

        Raises:
          SmfreeError: with the rank, peer, operation, lane and number of the first fault.
        """
        message = self._life.check()
        if message:
            raise SmfreeError(message)

    def stats(self) -> dict[str, int]:
        """Counters since creation, summed over the ranks of this process; final after `close`.

        For each phase, ``dispatch_send``, ``dispatch_recv``, ``combine_send`` and ``combine_recv``,
        with the operations of the backward pass:

        - ``dispatch_send_calls``, …: how often it ran.
        - ``dispatch_send_rows``, …: rows of the messages that it sent or unpacked.
        - ``dispatch_send_bytes``, …: bytes of these rows; on CPUs with weights and expert ids.
        - ``dispatch_recv_wait_ns``, ``combine_recv_wait_ns``: nanoseconds from the start of the
          phase to the last arrival.

        For the group:

        - ``dispatch_internode_bytes``, ``combine_internode_bytes``: sent from one node to another.
        - ``rows_relayed``, ``bytes_relayed``: what relays handed on in hierarchical mode.
        - ``rows_dropped``: copies of rows that did not fit into ``wire_capacity`` or
          ``recv_capacity``.
        - ``pending_receives``, ``messages_in_flight``: on CPUs, what waits now, and what has
          arrived and was not received yet.
        - ``sets_added``, ``sends_without_set``: on GPUs, how many sets of buffers were made for
          programs after the group was, and how often a send found none free, which is a fault.

        A portable group counts ``rows_dropped`` alone.

        On GPUs the counters are copied from each device, which takes tens of microseconds each and
        does not wait for what runs there.
        """
        return _sum(self._life.stats())

    def memory_report(self) -> dict[str, int]:
        """Bytes that the group holds in this process.

        On GPUs: ``device_bytes``, the buffers of the sets that there are now; ``scratch_bytes``,
        what else is on the devices; ``pinned_bytes``, on the host. On CPUs: ``arena_bytes``, of
        which ``arena_bytes_in_use`` hold rows now and ``arena_bytes_high_water`` did at most. A
        portable group holds nothing.
        """
        return _sum([native.memory_report() for native in self._life.natives])

    def trace(self) -> list[dict[str, Any]]:
        """The most recent phases on the GPUs of this process, in the order in which they began.

        Each is a dict of ``replica``, ``rank``, ``lane``, ``mirrored`` (an operation of the
        backward pass), ``replay`` (of a rematerialised forward pass), ``number`` (of the operation
        on its rank), ``phase`` (``"dispatch_send"``, …), ``begin_ns`` and ``end_ns`` (device time
        of its first and last block), ``bytes_read`` and ``bytes_written`` (the fewest that it can
        move). The last 64 operations of each rank, or more; none on CPUs.
        """
        return self._traces("trace")

    def start_wire_trace(self) -> None:
        """Lets the copy-engine movers note the times of their copies, up to 1024 per GPU.

        What goes to GPUs of other nodes is no copy.
        """
        for native in self._life.natives:
            if isinstance(native, backends.CUDA_GROUP):
                native.start_wire_trace()

    def end_wire_trace(self) -> list[dict[str, Any]]:
        """What the movers have noted since `start_wire_trace`, on the clock of `trace`.

        Each is a dict of ``replica``, ``rank``, ``peer``, ``lane``, ``mirrored``, ``replay``,
        ``number``, ``begin_ns``, ``end_ns`` and ``bytes``, of one chunk of the message from rank to
        peer.
        """
        return self._traces("end_wire_trace")

    def _traces(self, method: str) -> list[dict[str, Any]]:
        return [
            entry
            for native in self._life.natives
            if isinstance(native, backends.CUDA_GROUP)
            for entry in getattr(native, method)()
        ]


def _sum(reports: list[dict[str, int]]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for report in reports:
        total.update({name: 0 for name in report})
        total.update(report)
    return dict(total)
