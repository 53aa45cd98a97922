# SPDX-License-Identifier: Apache-2.0
"""A cable that is worse than a real one: it takes its time, loses packets, or is thin.

Every packet passes through a thread of this process. Linux can do the same (`tc … netem`), where
its kernel has that module.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import fcntl
import math
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

_DEVICE = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # of linux/if_tun.h
_MOST_BYTES = 65536  # of a packet
_QUEUE = 1000  # packets that one direction holds, as netem; what comes then is lost


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of each direction.

    Attributes:
      delay_s: from one end to the other.
      loss: the share of packets that never arrive.
      bytes_per_s: the most that pass.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = math.inf


def missing() -> str | None:
    """Why there can be no such cable here, or ``None``."""
    try:
        os.close(os.open(_DEVICE, os.O_RDWR))
    except OSError as error:
        return f"a cable of a given quality needs {_DEVICE}: {error.strerror}"
    return None


class Cable:
    """Between two processes with a network of their own, where it is the interface ``cable``."""

    def __init__(self, pids: Sequence[int], quality: Quality):
        self._ends = [_end_in(pid) for pid in pids]
        self._quality = quality
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="cable", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Both ends are gone."""
        self._ended.set()
        self._thread.join()
        for end in self._ends:
            os.close(end)

    def _carry(self) -> None:
        a, b = self._ends
        ways = {a: _Way(self._quality, 0, _into(b)), b: _Way(self._quality, 1, _into(a))}
        while not self._ended.is_set():
            due = min(way.next_due() for way in ways.values())
            patience = max(0.0, min(due - time.monotonic(), 0.1))
            for end in select.select(ways, [], [], patience)[0]:
                for packet in _waiting_at(end):
                    ways[end].take(packet, time.monotonic())
            for way in ways.values():
                way.deliver(time.monotonic())


class _Way:
    """One direction: packets in the order in which they came."""

    def __init__(self, quality: Quality, seed: int, deliver: Callable[[bytes], None]):
        self._quality, self._random, self._deliver = quality, random.Random(seed), deliver
        self._under_way: collections.deque[tuple[float, bytes]] = collections.deque()
        self._free_at = 0.0  # when the last packet is in the cable as a whole

    def take(self, packet: bytes, now: float) -> None:
        if self._random.random() < self._quality.loss or len(self._under_way) == _QUEUE:
            return
        self._free_at = max(now, self._free_at) + len(packet) / self._quality.bytes_per_s
        self._under_way.append((self._free_at + self._quality.delay_s, packet))

    def next_due(self) -> float:
        return self._under_way[0][0] if self._under_way else math.inf

    def deliver(self, now: float) -> None:
        while self.next_due() <= now:
            self._deliver(self._under_way.popleft()[1])


def _end_in(pid: int) -> int:
    """A descriptor of a new interface in the network of ``pid``: what it sends is read here."""
    end = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK)
    asked = struct.pack("16sH22x", b"cable%d", _IFF_TUN | _IFF_NO_PI)
    name = fcntl.ioctl(end, _TUNSETIFF, asked)[:16].rstrip(b"\0").decode()
    move = f"ip link set dev {name} netns {pid} name cable"
    subprocess.run(move.split(), check=True)
    return end


def _waiting_at(end: int) -> list[bytes]:
    packets = []
    with contextlib.suppress(BlockingIOError):
        while len(packets) < _QUEUE:
            packets.append(os.read(end, _MOST_BYTES))
    return packets


def _into(end: int) -> Callable[[bytes], None]:
    def deliver(packet: bytes) -> None:
        try:
            os.write(end, packet)
        except OSError as error:  # that interface is down: the packet is lost
            if error.errno != errno.EIO:
                raise

    return deliver
