# SPDX-License-Identifier: Apache-2.0
"""How processes meet, with threads in their place: the store is JAX's own, with its service."""

import collections
import itertools
import socket
import threading
import time

import pytest
from jaxlib import _jax

import jax_smfree as smfree
from jax_smfree._src import bootstrap, compat

PROCESSES = 16


class Counting:
    """A client of the store that counts what is asked of it."""

    def __init__(self, client):
        self.client, self.requests = client, collections.Counter()

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.requests[name] += 1
            return getattr(self.client, name)(*args, **kwargs)

        return call


@pytest.fixture(scope="module")
def store():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    service = _jax.get_distributed_runtime_service(address, num_nodes=1)
    client = _jax.get_distributed_runtime_client(address, node_id=0, init_timeout=10)
    client.connect()
    yield client
    client.shutdown()
    service.shutdown()


@pytest.fixture
def meeting(store, monkeypatch):
    """Runs an exchange of some of ``PROCESSES``, each in a thread; returns what each gets."""
    counting = Counting(store)
    monkeypatch.setattr(compat, "distributed_client", lambda: counting)
    # Threads of one process may not meet at one rendezvous; processes are what these stand for.
    monkeypatch.setattr(bootstrap, "_occupied", NeverOccupied())
    rendezvous = f"test/{next(_numbers)}"

    def meet(present=range(PROCESSES), timeout_s=20.0, delays=None):
        got = {}

        def come(process):
            time.sleep((delays or {}).get(process, 0.0))
            try:
                got[process] = bootstrap.exchange(
                    "test", rendezvous, f"of {process}", range(PROCESSES), process, timeout_s
                )
            except smfree.SmfreeError as error:
                got[process] = str(error)

        threads = [threading.Thread(target=come, args=[process]) for process in present]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return got

    meet.rendezvous, meet.requests = rendezvous, counting.requests
    meet.left = lambda: store.key_value_dir_get(f"{rendezvous}/")
    return meet


_numbers = itertools.count()


class NeverOccupied(set):
    def __contains__(self, rendezvous):
        return False


EVERYBODY = {p: [f"of {q}" for q in range(PROCESSES)] for p in range(PROCESSES)}


def test_everybody_gets_everything_and_nothing_is_left(meeting):
    for _ in range(3):  # at the same rendezvous
        assert meeting() == EVERYBODY
        assert meeting.left() == []


def test_requests_grow_with_the_processes_and_not_with_their_pairs(meeting):
    meeting()
    assert sum(meeting.requests.values()) <= 8 * PROCESSES < PROCESSES**2


@pytest.mark.parametrize("missing", [[0], [3], [3, 7]])
def test_who_is_missing(meeting, missing):
    present = [p for p in range(PROCESSES) if p not in missing]
    start = time.monotonic()
    errors = meeting(present, timeout_s=1.0)
    assert time.monotonic() - start < 8.0
    named = f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))} to come"
    for process in present:
        assert f"process {process} waited 1 s for {named}" in errors[process]
    assert meeting.left() == []
    assert meeting() == EVERYBODY  # the next time they do


def test_who_gave_up_earlier_is_met_the_next_time(meeting):
    """The first process comes when all others have gone, and stays for their return."""
    meeting(range(1, PROCESSES), timeout_s=0.2)
    returning = dict.fromkeys(range(1, PROCESSES), 2.0)
    assert meeting(timeout_s=20.0, delays=returning) == EVERYBODY


def test_a_key_that_was_left_behind(meeting, store):
    """By a process that was killed while it waited: no error of the store, and no answer for it."""
    meeting(range(1, PROCESSES), timeout_s=0.2)
    store.key_value_set(f"{meeting.rendezvous}/here/5", "stale", allow_overwrite=True)
    assert meeting(delays={0: 1.0}) == EVERYBODY


def test_two_threads_at_one_rendezvous(store, monkeypatch):
    monkeypatch.setattr(compat, "distributed_client", lambda: store)

    def wait_in_vain():
        with pytest.raises(smfree.SmfreeError, match="waited 1 s for process 1"):
            bootstrap.exchange("test", "test/twice", "", [0, 1], 0, 1.0)

    first = threading.Thread(target=wait_in_vain)
    first.start()
    time.sleep(0.3)
    with pytest.raises(smfree.SmfreeError, match="another thread of this process"):
        bootstrap.exchange("test", "test/twice", "", [0, 1], 0, 1.0)
    first.join()


def test_what_is_looked_at_meanwhile_ends_the_wait(store, monkeypatch):
    monkeypatch.setattr(compat, "distributed_client", lambda: store)

    def look():
        raise smfree.SmfreeError("a process died")

    start = time.monotonic()
    with pytest.raises(smfree.SmfreeError, match="a process died"):
        bootstrap.exchange("test", "test/look", "", [0, 1], 0, 30.0, look)
    assert time.monotonic() - start < 5.0
    assert store.key_value_dir_get("test/look/") == []


def test_a_store_that_is_gone(monkeypatch):
    class Gone:
        def __getattr__(self, name):
            def call(*_, **__):
                raise RuntimeError("UNAVAILABLE: failed to connect")

            return call

    monkeypatch.setattr(compat, "distributed_client", Gone)
    with pytest.raises(smfree.SmfreeError, match=r"key-value store.* UNAVAILABLE.*process 0"):
        bootstrap.exchange("test", "test/gone", "", [0, 1], 1, 1.0)
