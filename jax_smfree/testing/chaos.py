# SPDX-License-Identifier: Apache-2.0
"""`chaos`: a mover that delays, reorders and stalls, to shake a program on the CPU backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jax_smfree import _native
from jax_smfree._src.shown import shown

if TYPE_CHECKING:
    from jax_smfree._src.group import EpGroup

_MAX = 2**31


@contextlib.contextmanager
def chaos(
    group: EpGroup,
    *,
    seed: int = 0,
    max_delay_us: int = 500,
    reorder: bool = True,
    stall_probability: float = 0.0,
    stall_ms: int = 0,
) -> Iterator[None]:
    """Inside the ``with`` block the mover of ``group`` is as bad as one is allowed to be.

    A correct program gives the same bits under chaos as without: only times change. So run a
    program twice, and compare; or run it once, with a deadline.

    The messages of one operation from one rank to another stay in order, as a loop repeats it,
    because every mover guarantees that. What is sent in this process is held back here, so
    in a program of several processes each of them enters the block, with a ``seed`` of its own.

    Enter and leave the block while nothing of ``group`` runs: wait for results inside of it.
    Afterwards the mover is a quiet one, also if it was not before. CPU backend only.

    Args:
      group: the `EpGroup`, open.
      seed: the seed of the random numbers. The delays are the same for the same seed only as far as
        the program sends in the same order.
      max_delay_us: every message is held back by a random time up to this.
      reorder: whether messages may overtake those of other peers and other operations; it takes
        delays or stalls for them to do so.
      stall_probability: per message, of a pause in which nothing of the group is delivered ...
      stall_ms: ... for this long.

    Raises:
      ValueError, TypeError: for a time that is no whole number from 0 to 2**31, a probability
        outside of [0, 1], a closed group, or one of GPUs: their copies move as they move.

    Example::

      expected = step(x)
      with chaos(group, seed=1, max_delay_us=1000):
          np.testing.assert_array_equal(step(x), expected)
    """
    from jax_smfree._src import arguments
    from jax_smfree._src.group import EpGroup

    for name, value in (("max_delay_us", max_delay_us), ("stall_ms", stall_ms), ("seed", seed)):
        if not isinstance(value, int) or not 0 <= value <= _MAX:
            raise ValueError(
                f"chaos: got {name}={shown(value)}, expected a whole number, 0 to 2**31."
            )
    if not isinstance(stall_probability, int | float) or not 0 <= stall_probability <= 1:
        raise ValueError(
            f"chaos: got stall_probability={shown(stall_probability)}, expected a number from 0 "
            "to 1."
        )
    arguments.flag("chaos", "reorder", reorder)
    arguments.instance("chaos", "group", group, EpGroup)._check_open("chaos")

    natives = [native for native in group._life.natives if isinstance(native, _native.CpuGroup)]
    if len(natives) < len(group._life.natives):
        raise ValueError(
            f"chaos: got an EpGroup of backend {group.backend!r}, expected 'cpu', whose mover is "
            "a thread that can be delayed."
        )

    for replica, native in enumerate(natives):
        native.set_chaos(
            seed=seed + replica,
            max_delay_us=max_delay_us,
            reorder=bool(reorder),
            stall_probability=stall_probability,
            stall_ms=stall_ms,
        )
    try:
        yield
    finally:
        for native in natives:
            native.set_chaos(
                seed=0, max_delay_us=0, reorder=False, stall_probability=0.0, stall_ms=0
            )
