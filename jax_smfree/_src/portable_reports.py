# SPDX-License-Identifier: Apache-2.0
"""What the programs of a portable group tell it: wrong routings, and rows that did not fit.

A program calls back when there is something to tell, and only then: a call of Python costs more
than an operation. An exported program has no way back: it returns NaN, and nobody is told.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_smfree._src import compat

if TYPE_CHECKING:
    from jax_smfree._src.primitives import Call


class PortableGroup:
    """In the place of a native group. It holds no memory, and nothing waits in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fault: str | None = None
        self._overflow: str | None = None
        self._rows_dropped = 0

    def failed(self, text: str) -> None:
        with self._lock:
            self._fault = self._fault or text

    def dropped(self, rows: int, text: str | None) -> None:
        """``text`` says so where that is an error."""
        with self._lock:
            self._rows_dropped += rows
            self._overflow = self._overflow or text

    def check(self) -> str | None:
        with self._lock:
            overflow, self._overflow = self._overflow, None
            return self._fault or overflow

    def fault(self) -> str | None:
        return self._fault

    def stats(self) -> dict[str, int]:
        return {"rows_dropped": self._rows_dropped}

    def memory_report(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def check_routing(topk_idx: Array, call: Call) -> Array:
    """Whether a row names an expert twice or one that there is not; the group is told."""
    ordered = jnp.sort(topk_idx, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    nobody = (topk_idx < -1) | (topk_idx >= call.group.config.num_experts)
    wrong = jnp.any(twice, axis=1) | jnp.any(nobody, axis=1)
    row = jnp.argmax(wrong)
    faulty = jnp.any(wrong)
    _tell_if(faulty, _misrouted, _rank(call), row, topk_idx[row], call=call)
    return faulty


def check_capacity(
    num_dropped: Array, rows_sent: Array, is_cut: Array, capacity: Array, copies: Array, call: Call
) -> Array:
    """Whether copies that did not fit are an error; the group is told of them in any case.

    ``is_cut``: not all of the ``rows_sent`` fit on the wire. ``copies`` [E / R] came for each local
    expert, and ``capacity`` was for all or each of them.
    """
    overflowed = num_dropped > 0
    facts = (_rank(call), num_dropped, rows_sent, is_cut, capacity, copies)
    _tell_if(overflowed, _dropped, *facts, call=call)
    return overflowed & (call.group.config.overflow == "error")


def _rank(call: Call) -> Array:
    return jax.lax.axis_index(call.group.axis)


def _misrouted(group: PortableGroup, call: Call, rank: Any, row: Any, experts: Any) -> None:
    named = experts.tolist()
    of = call.group.config.num_experts
    wrong = next(e for i, e in enumerate(named) if not -1 <= e < of or (e >= 0 and e in named[:i]))
    why = "twice" if 0 <= wrong < of else f"of {of}"
    group.failed(
        f"invalid routing: {_call(call, 'dispatch_send', rank)}: row {row} names expert {wrong} "
        f"{why}: topk_idx = {named}. Fix: name each expert of a row once, -1 for none."
    )


def _dropped(
    group: PortableGroup, call: Call, rank: Any, dropped: Any, rows_sent: Any, is_cut: Any,
    here: Any, copies: Any,
) -> None:  # fmt: skip
    config, cure = call.group.config, "recv_capacity"
    shape = config.recv_shape(call.num_tokens, call.group.num_ranks)
    if is_cut:
        capacity = config.num_wire_rows(config.max_tokens, call.group.num_ranks)
        what = f"{rows_sent} rows came here and exceed wire_capacity {capacity}"
        if rows_sent <= call.num_wire_rows:
            what = f"a relay had more rows for the ranks of this node than wire_capacity {capacity}"
        if config.wire_capacity is None:
            what += ", which follows recv_capacity"
        else:
            cure = "wire_capacity"
    else:
        if here < shape[-1]:
            what, cure = f"{dropped} rows exceed capacity {here} of this call", "capacity"
        else:
            what = f"{dropped} rows exceed recv_capacity {config.recv_capacity}"
            what += f", {shape[1]} for each local expert" if len(shape) == 2 else ""
        if len(shape) == 2:
            expert = int(rank) * len(copies) + int(copies.argmax())
            what += f"; the busiest, expert {expert}, got {copies.max()}"
    text = (
        f"receive capacity exceeded: {_call(call, 'dispatch_recv', rank)}: {what}; the outputs are "
        f"NaN. Fix: raise {cure}, or take overflow='drop'."
    )
    group.dropped(int(dropped), text if config.overflow == "error" else None)


def _call(call: Call, phase: str, rank: Any) -> str:
    return f"rank {rank} in {phase} ({call.call_site}; lane {call.lane})"


# ---- calls back ----------------------------------------------------------------------------------


def _tell_if(when: Array, what: Any, *facts: Array, call: Call) -> None:
    jax.lax.cond(when, lambda: tell_p.bind(*facts, what=what, call=call), lambda: [])


def _tell(*facts: Array, what: Any, call: Call) -> list[Any]:
    jax.debug.callback(functools.partial(_told, what, call), *facts)
    return []


def _told(what: Any, call: Call, *facts: Any) -> None:
    """For as long as the group is held, and not closed."""
    group = call.group.group()
    for native in group._life.natives if group is not None else []:
        what(native, call, *facts)


def _lower_tell(ctx: Any, *facts: Any, **params: Any) -> Any:
    return [] if compat.is_export(ctx) else mlir.lower_fun(_tell)(ctx, *facts, **params)


tell_p = Primitive("smfree_tell")
tell_p.multiple_results = True
tell_p.def_abstract_eval(lambda *_, **__: [])
mlir.register_lowering(tell_p, _lower_tell)
