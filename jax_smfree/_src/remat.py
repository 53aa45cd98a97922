# SPDX-License-Identifier: Apache-2.0
"""``jax.checkpoint``: what it keeps of an operation, and what it runs again in the backward pass.

The routing (integers) is always kept, so that rows are not sent again for its sake. A recv is kept
whole if the policy says so; a send never is on its own, because its recv would have nothing to
receive from. What runs again has a derivation of its own, since it may run beside the original.

JAX has two implementations, which ``jax_remat3`` chooses from. The first splits a program that is
differentiated already, and asks `_split` about each operation. The second makes the replay first
and differentiates that: there an operation is `replay_p`, which is differentiated with the routing
that was kept, and gradients are made of its tangents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Literal, Primitive
from jax.interpreters import ad, mlir
from jax.interpreters import partial_eval as pe

from jax_smfree._src import compat
from jax_smfree._src.autodiff import DATA_PRIMITIVES, TANGENTS, batch_of_one
from jax_smfree._src.primitives import RECV_PRIMITIVES, REPLAY, ROUTING, Call, tie_p


def save_comm_policy(primitive: Any, *_: Any, **__: Any) -> bool:
    """A ``jax.checkpoint`` policy: keep what was received, so that nothing is sent again.

    ``jax.checkpoint(layer, policy=smfree.save_comm_policy)`` saves the results of every recv phase
    and computes everything else again. Without it a rematerialised layer sends its rows again.

    Example:
      >>> @on_ranks
      ... def gradient(x, topk_idx):
      ...     def layer(token, x):
      ...         d, token = smfree.dispatch(token, x, topk_idx)
      ...         return smfree.combine(token, d, jnp.tanh(d.x))
      ...     layer = jax.checkpoint(layer, policy=smfree.save_comm_policy)
      ...     def loss(x):
      ...         out, token = layer(group.token(), x)
      ...         return out.sum()
      ...     return jax.grad(loss)(x)
      >>> gradient(x, topk_idx).shape
      (16, 16)
    """
    return primitive in RECV_PRIMITIVES


def _is_kept_whole(policy: Any, primitive: Primitive, avals: Sequence[Any], call: Call) -> bool:
    return primitive in RECV_PRIMITIVES and compat.is_saved(policy(primitive, *avals, call=call))


def _are_routing(primitive: Primitive, results: Sequence[Any]) -> list[bool]:
    """Which of the results are."""
    routing = ROUTING.get(primitive, slice(0))
    return [i in range(*routing.indices(len(results))) for i in range(len(results))]


# ---- jax_remat3=False ----------------------------------------------------------------------------


def _split(saveable: Any, unknown: Sequence[bool], known_here: Sequence[bool], eqn: Any) -> Any:
    """What of ``eqn`` runs in the forward pass, and what in the backward pass."""
    residuals = [
        v
        for v, here in zip(eqn.invars, known_here, strict=True)
        if not here and not isinstance(v, Literal)
    ]
    everything, nothing = [True] * len(eqn.outvars), [False] * len(eqn.outvars)
    if any(unknown):  # a tangent: it runs in the backward pass only
        return None, eqn, everything, everything, residuals
    if _is_kept_whole(saveable, eqn.primitive, [v.aval for v in eqn.invars], eqn.params["call"]):
        return eqn, None, nothing, nothing, []
    again = [not routing for routing in _are_routing(eqn.primitive, eqn.outvars)]
    unused = [type(v)(v.aval) for v in eqn.outvars]
    copy = eqn.replace(
        outvars=[v if a else u for v, u, a in zip(eqn.outvars, unused, again, strict=True)],
        params={"call": eqn.params["call"].derived(REPLAY)},
    )
    return eqn, copy, nothing, again, residuals


# ---- jax_remat3=True -----------------------------------------------------------------------------
#
# Operands of replay_p are what was kept of the results of the primitive `of`, then the operands of
# that; `kept` says which results were.

replay_p = Primitive("smfree_replay")
replay_p.multiple_results = True


def _replay(*values: Any, of: Primitive, call: Call, kept: tuple[bool, ...]) -> Sequence[Any]:
    was_kept, operands = iter(values[: sum(kept)]), values[sum(kept) :]
    if all(kept):
        return list(was_kept)
    again = of.bind(*operands, call=call.derived(REPLAY))
    return [next(was_kept) if k else v for v, k in zip(again, kept, strict=True)]


def _replay_abstract(
    *avals: Any, of: Primitive, call: Call, kept: tuple[bool, ...]
) -> Sequence[Any]:
    results: Sequence[Any] = of.abstract_eval(*avals[sum(kept) :], call=call)[0]
    return results


def _replay_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *,
    of: Primitive, call: Call, kept: tuple[bool, ...],
) -> Any:  # fmt: skip
    """That of the operation that runs again: what was kept has no tangent of its own.

    It has the derivation of a replay: in the second order the original has a tangent as well.
    """
    out = replay_p.bind(*primals, of=of, call=call, kept=kept)
    own = slice(sum(kept), None)
    return out, TANGENTS[of](out, primals[own], tangents[own], call=call.derived(REPLAY))


def _replay_dce(used: Sequence[bool], eqn: Any) -> Any:
    """Where only kept results are used, they are all that is left: nothing is sent again."""
    kept = eqn.params["kept"]
    if any(u and not k for u, k in zip(used, kept, strict=True)):
        return [True] * len(eqn.invars), eqn
    used_kept = [u for u, k in zip(used, kept, strict=True) if k]
    used_inputs = used_kept + [False] * (len(eqn.invars) - len(used_kept))
    if not any(used):
        return used_inputs, None
    left = [
        [v for v, u in zip(vs, us, strict=True) if u]
        for vs, us in ((eqn.invars, used_inputs), (eqn.outvars, used))
    ]
    return used_inputs, eqn.replace(primitive=tie_p, invars=left[0], outvars=left[1], params={})


replay_p.def_abstract_eval(_replay_abstract)
compat.impl(replay_p)
mlir.register_lowering(replay_p, mlir.lower_fun(_replay, multiple_results=True))
ad.primitive_jvps[replay_p] = _replay_jvp
compat.set_batch_rule(replay_p, batch_of_one(replay_p))
compat.set_dce_rule(replay_p, _replay_dce)


def _register(primitive: Primitive) -> None:
    pe.partial_eval_jaxpr_custom_rules[primitive] = _split

    def kept(policy: Any, operands: Sequence[Any], results: Sequence[Any], call: Call) -> Any:
        avals = [jax.typeof(v) for v in operands]
        whole = policy is not None and _is_kept_whole(policy, primitive, avals, call)
        return tuple(whole or routing for routing in _are_routing(primitive, results))

    def run(policy: Any, *operands: Any, call: Call) -> Any:
        out = primitive.bind(*operands, call=call)
        which = kept(policy, operands, out, call)
        return out, (which, [v for v, k in zip(out, which, strict=True) if k])

    def run_again(kept: Any, *operands: Any, call: Call) -> Any:
        which, values = kept
        return replay_p.bind(*values, *operands, of=primitive, call=call, kept=which)

    compat.set_remat3_rule(primitive, run, run_again)


for _primitive in DATA_PRIMITIVES:
    _register(_primitive)
