# SPDX-License-Identifier: Apache-2.0
"""Handles that no dispatch has made, and what a combine says of them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jax_smfree as smfree

ROW, EXPERTS = 4, (1, 4)  # it goes to two ranks, on every rank
FAR = 2**30


@dataclasses.dataclass(frozen=True)
class Bad:
    """An array of the handle is spoiled; the phase that looks at it refuses it with these words."""

    field: str
    spoil: Callable[[jax.Array], jax.Array]
    phase: str
    words: str


BAD = {
    "place too high": Bad(
        "places", lambda a: a.at[4, 0].set(FAR), "combine_recv", f"row 4 has place {FAR}"
    ),
    "place negative": Bad(
        "places", lambda a: a.at[4, 0].set(-2), "combine_recv", "row 4 has place -2"
    ),
    "places descend": Bad(
        "places", lambda a: a.at[4].set(a[4, ::-1]), "combine_recv", r"row 4 has place \d"
    ),
    "row too high": Bad(
        "rows",
        lambda a: a.at[0, 0].set(FAR),
        "combine_send",
        f"rank 0 is {FAR}, out of the range",
    ),
    "too many rows": Bad(
        "recv_counts",
        lambda a: a.at[0].set(7),
        "combine_send",
        "rank 0 is 7, out of the range up to 6",
    ),
}

BAD_IN_NODES = BAD | {
    "relay place too high": Bad(
        "relay", lambda a: a.at[0, 0, 0].set(FAR), "combine_send", f"row 0 has place {FAR}"
    ),
    "relayed to a rank twice": Bad(
        "relay", lambda a: a.at[0, 0].set(jnp.arange(2)), "combine_send", "row 0 has place 1"
    ),
    "relay without a row": Bad(
        "relay", lambda a: a.at[0, 0].set(-1), "combine_send", r"row \d has place"
    ),
}


def spoiled_round_trip(bad: Bad, rank: int) -> Callable[..., jax.Array]:
    """``local(token, x, topk_idx, topk_weights)``, in which ``rank`` spoils its handle."""

    def local(token, x, topk_idx, topk_weights):
        topk_idx = topk_idx.at[ROW].set(jnp.array(EXPERTS))
        d, token = smfree.dispatch(token, x, topk_idx, topk_weights)
        array = getattr(d.handle, bad.field)
        here = jax.lax.axis_index("ep") == rank
        spoiled = {bad.field: jnp.where(here, bad.spoil(array), array)}
        d = d.replace(handle=dataclasses.replace(d.handle, **spoiled))
        return smfree.combine(token, d, d.x)[0]

    return local
