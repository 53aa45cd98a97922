# SPDX-License-Identifier: Apache-2.0
"""How the processes of a group find each other: JAX's distributed key-value store.

Processes meet at a rendezvous, which is a name that they agree on. The first of them gathers what
the others bring and answers each: a few requests per process, not one per pair. Nobody counts
meetings: who comes there meets whoever waits there now, so a process that waited in vain can come
again.
What is stored carries a word of its own (a nonce) for that, and is deleted after use.
"""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax_smfree._src import compat
from jax_smfree._src.errors import SmfreeError

# Between two looks at what else may have happened (Ctrl-C, a fault of the group).
_LOOK_EVERY_S = 1.0
# The store gets this long for an answer, also when the deadline has passed.
_LEAST_S = 0.1
# The others are more patient than the first process, so that they hear from it who is missing.
_GRACE_S = 2.0

_occupied: set[str] = set()


def exchange(
    what: str,
    rendezvous: str,
    mine: str,
    processes: Sequence[int],
    me: int,
    timeout_s: float,
    look: Callable[[], None] = lambda: None,
) -> list[str]:
    """Collective over ``processes``: brings ``mine`` and returns what each brought.

    Args:
      what: the call that is made, for errors, such as ``"EpGroup.create"``.
      look: is called about once a second while this waits; what it raises ends the exchange.

    Raises:
      SmfreeError: ``jax.distributed`` was not initialised or its coordinator does not answer, a
        process did not come within ``timeout_s``; the text names it.
    """
    client = compat.distributed_client()
    if client is None:
        raise SmfreeError(
            f"{what}: the group spans processes {list(processes)}, but jax.distributed is not "
            "initialised here. Call jax.distributed.initialize() first."
        )
    store = _Store(what, client, time.monotonic() + timeout_s, look)
    try:
        with _alone_at(what, rendezvous):
            if me == processes[0]:
                return _gather(store, rendezvous, mine, processes)
            store.deadline += _GRACE_S
            return _bring(store, rendezvous, mine, processes, me)
    except _MissingError as missing:
        raise SmfreeError(
            f"{what}: process {me} waited {timeout_s:.0f} s for {_named(missing.processes)} to "
            f"come to the same call. {what} is collective: every process of the mesh calls it, in "
            "the same order, with the same mesh, axis and config."
        ) from None


class _MissingError(Exception):
    def __init__(self, processes: Sequence[int]):
        self.processes = list(processes)


def _named(processes: Sequence[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"


@contextlib.contextmanager
def _alone_at(what: str, rendezvous: str) -> Iterator[None]:
    """Two threads of a process that meet others at one would take each other's answers."""
    if rendezvous in _occupied:
        raise SmfreeError(
            f"{what}: another thread of this process is in the same call for the same devices. "
            "Make these calls one after the other, in the same order in all processes."
        )
    _occupied.add(rendezvous)
    try:
        yield
    finally:
        _occupied.discard(rendezvous)


class _Store:
    """The key-value store, until a deadline, with errors of ours."""

    def __init__(self, what: str, client: Any, deadline: float, look: Callable[[], None]):
        self.what, self.client, self.deadline, self.look = what, client, deadline, look

    def get(self, key: str) -> str | None:
        """Waits for the value; ``None`` when the deadline has passed."""
        while True:
            left_s = self.deadline - time.monotonic()
            milliseconds = int(1000 * min(max(left_s, _LEAST_S), _LOOK_EVERY_S))
            try:
                return str(self.client.blocking_key_value_get(key, milliseconds))
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise self._error(error) from error
            if left_s <= 0:
                return None
            self.look()

    def put(self, key: str, value: str) -> None:
        """What an earlier process of this number left there goes."""
        try:
            self.client.key_value_set(key, value, allow_overwrite=True)
        except Exception as error:
            raise self._error(error) from error

    def delete(self, key: str) -> None:
        try:
            self.client.key_value_delete(key)
        except Exception as error:
            raise self._error(error) from error

    def names_under(self, directory: str) -> set[str]:
        """The last parts of the keys there."""
        try:
            entries = self.client.key_value_dir_get(directory)
        except Exception as error:
            raise self._error(error) from error
        return {key.rsplit("/", 1)[-1] for key, _ in entries}

    def _error(self, error: Exception) -> SmfreeError:
        return SmfreeError(
            f"{self.what}: the key-value store of jax.distributed, through which processes find "
            f"each other, says: {error}. It lives in process 0: see whether that still runs."
        )


def _gather(store: _Store, rendezvous: str, mine: str, processes: Sequence[int]) -> list[str]:
    """What the first process does: waits for the others, and answers them."""
    me, *others = processes
    store.put(f"{rendezvous}/here/{me}", "")  # for those who ask who is missing
    here, missing = [me], []
    nonces, values = [], [mine]
    present: set[str] | None = None  # asked for once the deadline has passed
    try:
        for process in others:
            come = present is None or str(process) in present
            brought = store.get(f"{rendezvous}/here/{process}") if come else None
            if brought is None:
                present = present or store.names_under(f"{rendezvous}/here/")
                missing.append(process)
                continue
            here.append(process)
            nonce, value = json.loads(brought)
            nonces.append(nonce)
            values.append(value)
    finally:
        for process in here:
            store.delete(f"{rendezvous}/here/{process}")
    answer = json.dumps({"missing": missing, "values": [] if missing else values})
    for nonce in nonces:
        store.put(f"{rendezvous}/answer/{nonce}", answer)
    if missing:
        raise _MissingError(missing)
    return values


def _bring(
    store: _Store, rendezvous: str, mine: str, processes: Sequence[int], me: int
) -> list[str]:
    """What the others do: bring ``mine`` to the first process, and wait for its answer."""
    nonce = secrets.token_hex(8)
    store.put(f"{rendezvous}/here/{me}", json.dumps([nonce, mine]))
    answered = False
    try:
        text = store.get(f"{rendezvous}/answer/{nonce}")
        answered = text is not None
        if text is None:
            raise _MissingError(_not_here(store.names_under(f"{rendezvous}/here/"), processes))
        answer = json.loads(text)
        if answer["missing"]:
            raise _MissingError(answer["missing"])
        values: list[str] = answer["values"]
        return values
    finally:
        store.delete(f"{rendezvous}/answer/{nonce}" if answered else f"{rendezvous}/here/{me}")


def _not_here(here: set[str], processes: Sequence[int]) -> Sequence[int]:
    """The first process, if it is not; else those who kept it waiting.

    Without the first one nobody knows: others may have waited in vain and have gone already.
    """
    first, *others = processes
    if str(first) not in here:
        return [first]
    return [process for process in others if str(process) not in here] or [first]


def host_name() -> str:
    """This host, as other processes on it see it too."""
    return platform.node()


def new_secret() -> str:
    """A word that strangers do not know; it guards the sockets of a group."""
    return secrets.token_hex(16)
