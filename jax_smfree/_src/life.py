# SPDX-License-Identifier: Apache-2.0
"""From the creation of a group in this process to its end: who watches it, and who ends it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import jax

from jax_smfree import _native
from jax_smfree._src.fence import Fence

if TYPE_CHECKING:
    from jax_smfree._src.backends import NativeGroup

_logger = logging.getLogger("jax_smfree")

# How long programs may go on where nobody waits for their results any more.
GRACE_S = 0.5
# How long a thread may take to notice that it has nothing to wait for.
_NOTICE_S = 0.1
# How often a group is asked for a fault. The fault itself ends what waits at once.
_LOOK_EVERY_S = 0.1

_ENDED, _DROPPED = "ended", "dropped"
_living: set[Life] = set()


class Life:
    """The native groups behind an `EpGroup`, and a thread that watches over them.

    The thread writes their first fault to the log as soon as it happens: the program may be waiting
    for a dead rank in a collective of JAX, where nobody can tell it. And it ends them when the
    `EpGroup` was dropped without ``close``; so it holds this object, and never the `EpGroup`.
    """

    def __init__(self, name: str, timeout_s: float):
        self._name = name
        self._timeout_s = timeout_s
        self.natives: list[NativeGroup] = []
        self._fence: Fence | None = None
        self._closing, self._telling = threading.Lock(), threading.Lock()
        self._ended = False
        self._fault_told_at: float | None = None
        self._last_words: str | None = None
        self._final_stats: list[dict[str, int]] | RuntimeError = []
        # A SimpleQueue, because what puts into it may be a finaliser, in any thread at any time.
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="smfree-watch", daemon=True)

    def begin(self, natives: Sequence[NativeGroup], devices: Sequence[jax.Device]) -> None:
        """``natives`` are those on ``devices`` of this process."""
        if devices:
            self._fence = Fence(devices)
        self.natives = list(natives)
        _living.add(self)
        self._thread.start()

    def check(self) -> str | None:
        """What went wrong, an overflow included; after the end, what had gone wrong until then."""
        return _first(native.check() for native in self.natives) or self._last_words

    def fault(self) -> str | None:
        """What went wrong for good, as far as the group has not ended."""
        return _first(native.fault() for native in self.natives)

    def stats(self) -> list[dict[str, int]]:
        """The counters of each native group; after the end, as they were then.

        Raises:
          RuntimeError: a GPU does not end what it runs, so that its counters cannot be read.
        """
        if self.natives:
            return [native.stats() for native in self.natives]
        if isinstance(self._final_stats, RuntimeError):
            raise self._final_stats
        return self._final_stats

    def launched_ended(self, timeout_s: float) -> bool:
        """Whether the programs that were launched until now end in time."""
        return self._fence is None or self._fence.wait(timeout_s, self._is_hopeless)

    def _is_hopeless(self) -> bool:
        """Ended by another thread; or what runs long after a fault waits for a rank that failed."""
        told_at = self._fault_told_at
        return self._ended or (told_at is not None and time.monotonic() > told_at + GRACE_S)

    def end(self, timeout_s: float) -> None:
        """Waits so long for what was launched, then ends what still waits. Idempotent."""
        try:
            if not self._ended and self.launched_ended(timeout_s):
                self._tell_unreceived()
        finally:  # also after Ctrl-C
            self._end()

    def _end(self) -> None:
        with self._closing:
            if not self._ended:
                fault = self.fault()
                self._close_natives()
                self._events.put(_ENDED)
                self._tell_fault(fault)
        _living.discard(self)
        # The interpreter aborts the process if it ends while a thread of its own is in C++.
        if self._fence is not None:
            self._fence.end(_NOTICE_S)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_NOTICE_S)

    def _close_natives(self) -> None:
        self._last_words = self.check()
        try:
            with contextlib.ExitStack() as closing:  # all of them, also if one raises
                for native in self.natives:
                    closing.callback(native.close)
        finally:
            try:
                self._final_stats = self.stats()
            except RuntimeError as error:
                self._final_stats = error
            self._ended = True
            # Memory and descriptors go now, whoever keeps this object alive.
            self.natives = []

    def drop(self) -> None:
        """The `EpGroup` is gone. A finaliser: in any thread, in the middle of anything."""
        if self._ended:
            return
        self._events.put(_DROPPED)
        warnings.warn(
            f"{self._name} was dropped without close(). It is closed now, when the programs that "
            "were launched have ended. Close it, or use it as a context manager: until somebody "
            "notices, it holds memory and a socket to every other process.",
            ResourceWarning,
            stacklevel=2,
        )

    def _watch(self) -> None:
        while not self._ended:
            self._tell_fault(self.fault())
            period_s = _LOOK_EVERY_S if self._fault_told_at is None else None
            try:
                event = self._events.get(timeout=period_s)
            except queue.Empty:
                continue
            if event == _DROPPED:
                self.end(self._timeout_s)

    def _tell_fault(self, fault: str | None) -> None:
        """Once for a group."""
        with self._telling:
            if not fault or self._fault_told_at is not None:
                return
            self._fault_told_at = time.monotonic()
        _logger.error("%s failed: %s", self._name, fault)

    def _tell_unreceived(self) -> None:
        """What is in flight when all programs have ended, nobody can receive any more."""
        for native in self.natives:
            if isinstance(native, _native.CpuGroup) and (unreceived := native.unreceived()):
                _logger.warning(
                    "%s is closed, and ranks of this process have sent and never received %s. "
                    "Receive every operation with the token that its send returned.",
                    self._name,
                    unreceived,
                )


def _first(messages: Iterable[str | None]) -> str | None:
    return next(filter(None, messages), None)


def _leave_to_parent() -> None:
    """In a child there are none of the threads, and what is closed here would be the parent's."""
    for life in _living:
        life._ended = True
    _living.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@atexit.register
def _end_all() -> None:
    for life in list(_living):
        life.end(GRACE_S)
