# SPDX-License-Identifier: Apache-2.0
"""`World`: the processes that run a test together, as the test sees them."""

import collections
import json
from typing import Any


class World:
    """The processes that run the same program, with small host-side exchanges between them.

    Exchanges go through the key-value store of ``jax.distributed``, so they work while devices are
    busy, and say who is missing. Every process makes the same exchanges in the same order.

    Attributes:
      rank: ``jax.process_index()`` of this process.
      num_processes: how many there are.
    """

    def __init__(self, rank: int = 0, num_processes: int = 1) -> None:
        self.rank = rank
        self.num_processes = num_processes
        self.enter("world")

    def enter(self, scope: str) -> None:
        """Starts counting exchanges anew, under a name that no rank has used before.

        The test runner does so before each test, so that a test which fails on one rank in the
        middle does not shift the exchanges of the next one.
        """
        self._scope = scope
        self._used: collections.Counter[str] = collections.Counter()

    def __repr__(self) -> str:
        return f"World(rank={self.rank}, num_processes={self.num_processes})"

    def barrier(self, name: str = "barrier", timeout_s: float = 60.0) -> None:
        """Waits until every process has come here.

        Raises:
          TimeoutError: names the first rank that did not come.
        """
        self.exchange(None, name=name, timeout_s=timeout_s)

    def exchange(self, value: Any, name: str = "exchange", timeout_s: float = 60.0) -> list[Any]:
        """Gives ``value`` to every process, and returns the values of all, by rank.

        Args:
          value: anything that JSON can carry.
          name: for messages, and to tell exchanges apart that may run side by side in threads.
          timeout_s: how long to wait for each rank.

        Raises:
          TimeoutError: names the first rank whose value did not come.
          TypeError: for a value that JSON cannot carry.
          RuntimeError: where this process is in no program of ``jax.distributed``, or where another
            `World` of it has made the same exchange already.

        Example::

          def test_shared_directory(world, tmp_path):
              directory = world.exchange(str(tmp_path))[0]  # rank 0's, on every rank
        """
        try:
            text = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"World.exchange: got {value!r}, expected what JSON can carry: {error}. Send a "
                "path, or lists of numbers."
            ) from None
        key = f"jax_smfree/{self._scope}/{name}/{self._used[name]}"
        self._used[name] += 1
        if self.num_processes == 1:
            return [json.loads(text)]
        import jax

        from jax_smfree._src.compat import distributed_client

        client = distributed_client()
        if client is None:
            raise RuntimeError(
                f"{self!r}: jax.distributed is not initialised, expected it to be in all "
                "processes. Call jax_smfree.testing.initialize() before anything else uses JAX."
            )
        try:
            client.key_value_set(f"{key}/{self.rank}", text)
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(
                f"{self!r}: got exchange {key!r} a second time ({error}). Make one World per "
                "process, on the rank that it has there, or give the exchanges other names."
            ) from error
        values = []
        for rank in range(self.num_processes):
            try:
                got = client.blocking_key_value_get(f"{key}/{rank}", int(timeout_s * 1000))
            except jax.errors.JaxRuntimeError as error:
                raise TimeoutError(
                    f"rank {self.rank} of {self.num_processes} waited {timeout_s:g} s in "
                    f"{name!r} for rank {rank}, which did not come: {error}. Look at that rank's "
                    "log; all ranks have to make the same exchanges in the same order."
                ) from error
            values.append(json.loads(got))
        return values
