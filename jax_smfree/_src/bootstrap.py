# SPDX-License-Identifier: Apache-2.0
"""How the processes of a group find each other: JAX's distributed key-value store."""

import platform
import secrets
import time
from collections.abc import Sequence

from jax_smfree._src import compat
from jax_smfree._src.errors import SmfreeError


def exchange(key: str, mine: str, processes: Sequence[int], me: int, timeout_s: float) -> list[str]:
    """Collective over ``processes``: publishes ``mine`` under ``key`` and returns everybody's.

    Raises:
      SmfreeError: ``jax.distributed`` was not initialised, or a process did not come within
        ``timeout_s``; the text names it.
    """
    client = compat.distributed_client()
    if client is None:
        raise SmfreeError(
            f"EpGroup.create: the group spans processes {list(processes)}, but jax.distributed is "
            "not initialised here. Call jax.distributed.initialize() first."
        )
    client.key_value_set(f"{key}/{me}", mine)
    deadline = time.monotonic() + timeout_s
    values = []
    for process in processes:
        remaining_ms = max(1, int((deadline - time.monotonic()) * 1000))
        try:
            values.append(client.blocking_key_value_get(f"{key}/{process}", remaining_ms))
        except Exception as error:
            raise SmfreeError(
                f"EpGroup.create: process {me} waited {timeout_s:.0f} s for process {process} to "
                "create the same group. EpGroup.create is collective: every process of the mesh "
                "calls it, in the same order, with the same mesh, axis and config."
            ) from error
    return values


def host_name() -> str:
    """This host, as other processes on it see it too."""
    return platform.node()


def new_secret() -> str:
    """A word that strangers do not know; it guards the sockets of a group."""
    return secrets.token_hex(16)
