# SPDX-License-Identifier: Apache-2.0
"""Programs in which a process fails. Each process tells in its log what the others make of it."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jax_smfree as smfree
from faults.handles import BAD_IN_NODES, spoiled_round_trip
from faults.running import CONFIG, assert_works, compiled, error_of, round_trip
from jax_smfree import testing
from jax_smfree._src import compat
from support import Problem, make_problem

ODD = 1  # the process that fails; not the one that JAX's coordinator lives in, see `leave`


@dataclasses.dataclass(frozen=True)
class Setting:
    """A group over all processes that has worked so far."""

    group: smfree.EpGroup
    problem: Problem
    step: Callable[..., Any]

    def tell_errors(self, step: Callable[..., Any] | None = None) -> None:
        tell(**self.errors(step))

    def tell_check(self) -> None:
        tell(check=self.check())

    def errors(self, step: Callable[..., Any] | None = None) -> dict[str, Any]:
        """Runs a step; what each rank of this process says, and after which time.

        With one device in a process JAX runs the step at once, and raises here; else the arrays
        have the errors. A rank of a GPU raises none, its part of the result is NaN.
        """
        begin = time.monotonic()
        found = {}
        try:
            shards = (step or self.step)(*self.problem.arrays[:3]).addressable_shards
            shards = sorted(shards, key=lambda shard: shard.index[0].start or 0)
            errors = [error_of(shard.data) for shard in shards]
            if errors == [None] * len(errors):
                found["finite"] = all(bool(np.isfinite(shard.data).all()) for shard in shards)
        except jax.errors.JaxRuntimeError as error:
            errors = [str(error)]
        return found | {"errors": errors, "seconds": time.monotonic() - begin}

    def check(self) -> str | None:
        """What ``check`` says."""
        try:
            self.group.check()
        except smfree.SmfreeError as error:
            return str(error)
        return None


def start(
    timeout_s: float,
    local: Callable[..., Any] = round_trip,
    mode: Any = "direct",
    ranks_per_node: int | None = None,
) -> Setting:
    """Joins the others, and shows that the group works; ``local`` is the step to come."""
    testing.initialize()
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    config = smfree.EpConfig(
        **CONFIG, timeout_s=timeout_s, mode=mode, ranks_per_node=ranks_per_node
    )
    group = smfree.EpGroup.create(mesh, config=config)
    assert_works_everywhere(group)
    problem = make_problem(mesh)
    setting = Setting(group, problem, compiled(group, local, problem))
    meet()
    return setting


@functools.cache
def _world() -> testing.World:
    return testing.World(jax.process_index(), jax.process_count())


def meet() -> None:
    """Waits for all processes, through JAX's coordinator and not through the group."""
    _world().barrier()


def tell(**what: Any) -> None:
    # In one write: an unbuffered print writes the line's end apart, and XLA logs to the same file.
    sys.stdout.write(f"TOLD {json.dumps(what)}\n")


@contextlib.contextmanager
def telling_errors() -> Iterator[None]:
    """Tells what ends the block, and when."""
    try:
        yield
    except Exception as error:
        tell(error=str(error), failed_at=time.monotonic())
        raise


def assert_local_group_works() -> None:
    """The process goes on with what it has."""
    mesh = Mesh(np.array(jax.local_devices()), ("ep",))
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        assert_works(group)


def leave(directory: str, survivors: list[int]) -> None:
    """Ends a process whose peers died.

    Not in order: JAX's own shutdown waits for the dead one, and then aborts. And when process 0,
    where JAX's coordinator lives, is gone, JAX aborts the others: so it goes last.
    """
    me = jax.process_index()
    Path(directory, f"left-{me}").touch()
    deadline = time.monotonic() + 30
    if me == 0:
        while time.monotonic() < deadline and not all(
            Path(directory, f"left-{p}").exists() for p in survivors
        ):
            time.sleep(0.02)
    os._exit(0)


# ---- the programs --------------------------------------------------------------------------------


def killed(
    directory: str, mode: str, timeout_s: float = 60.0, ranks_per_node: int | None = None
) -> None:
    """A process is killed between its dispatch and its combine."""

    def local(token, *arrays):
        d, token = smfree.dispatch(token, *arrays)
        odd = jax.lax.axis_index("ep") // jax.local_device_count() == ODD
        forever = jnp.where(odd, 2**31 - 1, 0)
        y = jax.lax.fori_loop(0, forever, lambda _, y: jnp.sin(y), d.x)
        return smfree.combine(token, d, y)[0]

    setting = start(timeout_s, local, mode, ranks_per_node)
    if jax.process_index() == ODD:
        die_after_dispatch(setting.group)
    setting.tell_errors()
    setting.tell_check()
    begin = time.monotonic()
    setting.group.close()
    tell(close_seconds=time.monotonic() - begin)
    assert_local_group_works()
    leave(directory, [p for p in range(jax.process_count()) if p != ODD])


def killed_while_others_wait_elsewhere(directory: str) -> None:
    """As `killed`, in a step that ends in a collective of JAX, from which nobody may come back."""

    def local(token, *arrays):
        d, token = smfree.dispatch(token, *arrays)
        odd = jax.lax.axis_index("ep") // jax.local_device_count() == ODD
        forever = jnp.where(odd, 2**31 - 1, 0)
        y = jax.lax.fori_loop(0, forever, lambda _, y: jnp.sin(y), d.x)
        out = smfree.combine(token, d, y)[0]
        return out + jax.lax.pmean(jnp.sum(out), "ep")

    setting = start(60.0, local)
    begin = time.monotonic()
    if jax.process_index() == ODD:
        die_after_dispatch(setting.group)
    else:
        logging.getLogger("jax_smfree").addHandler(TellAndLeave(directory, begin))
    setting.errors()
    time.sleep(30)


class TellAndLeave(logging.Handler):
    """Ends this process at the first record, wherever its main thread is."""

    def __init__(self, directory: str, begin: float):
        super().__init__()
        self.directory, self.begin = directory, begin

    def emit(self, record: logging.LogRecord) -> None:
        tell(log=record.getMessage(), seconds=time.monotonic() - self.begin)
        leave(self.directory, [p for p in range(jax.process_count()) if p != ODD])


def die_after_dispatch(group: smfree.EpGroup) -> None:
    """The process ends when all its ranks have received the dispatch that is to come."""
    wanted = group.stats()["dispatch_recv_calls"] + jax.local_device_count()

    def die() -> None:
        while group.stats()["dispatch_recv_calls"] < wanted:
            time.sleep(0.01)
        time.sleep(0.2)  # the others wait for its combine now
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()


def never_sends(mode: str) -> None:
    """A process stays away from a step."""
    setting = start(2.0, mode=mode)
    if jax.process_index() == ODD:
        meet()
    else:
        setting.tell_errors()
        meet()
    setting.tell_check()
    setting.group.close()
    assert_local_group_works()


def comes_late(seconds: float, timeout_s: float, ranks_per_node: int | None) -> None:
    """A process takes its time before a step; the others wait, and fail if it is too long."""
    setting = start(timeout_s, ranks_per_node=ranks_per_node)
    if jax.process_index() == ODD:
        time.sleep(seconds)
    setting.tell_errors()
    setting.tell_check()
    meet()
    setting.group.close()
    assert_local_group_works()


def other_step(token, *arrays):
    d, token = smfree.dispatch(token, *arrays)
    return smfree.combine(token, d, 2 * d.x)[0]


def runs_another_program() -> None:
    """A process runs a step of another line of the program."""
    odd = None
    setting = start(3.0)
    if jax.process_index() == ODD:
        odd = compiled(setting.group, other_step, setting.problem)
    meet()
    setting.tell_errors(odd)
    meet()
    setting.tell_check()
    setting.group.close()
    assert_local_group_works()


def takes_another_branch(what: str) -> None:
    """One program, in which the ranks of a process send from another line, or fewer rows."""

    def fewer_rows(token, *arrays):
        return usual(token, *(a[:3] for a in arrays))

    def other_line(token, *arrays):
        return smfree.dispatch(token, *arrays)[0].num_dropped

    def usual(token, *arrays):
        return smfree.dispatch(token, *arrays)[0].num_dropped

    def local(token, *arrays):
        other = {"line": other_line, "rows": fewer_rows}[what]
        odd = jax.lax.axis_index("ep") // jax.local_device_count() == ODD
        return jax.lax.cond(odd, other, usual, token, *arrays)

    setting = start(60.0, local)
    setting.tell_errors()
    setting.tell_check()
    meet()


def closes_too_early() -> None:
    """A process closes the group, the others still use it."""
    setting = start(60.0)
    if jax.process_index() == ODD:
        setting.group.close()
    else:
        setting.tell_errors()
        setting.tell_check()
    meet()
    setting.group.close()
    assert_local_group_works()


def exits_in_the_middle(seconds: float, timeout_s: float = 60.0) -> None:
    """A process comes to its end while its receives wait for the others, who come later."""
    setting = start(timeout_s)
    if jax.process_index() != ODD:
        time.sleep(seconds)
        setting.tell_errors()
        setting.tell_check()
        return
    sends = setting.group.stats()["dispatch_send_calls"]
    out = setting.step(*setting.problem.arrays[:3])
    while setting.group.stats()["dispatch_send_calls"] < sends + jax.local_device_count():
        time.sleep(0.01)
    # A GPU's receives follow on the stream.
    while setting.group.stats().get("pending_receives", math.inf) < jax.local_device_count():
        time.sleep(0.01)
    assert not out.is_ready()
    tell(exits=True)


def spoils_handles(ranks_per_node: int) -> None:
    """A rank passes handles that no dispatch has made, one to each of several groups."""
    for name, bad in BAD_IN_NODES.items():
        local = spoiled_round_trip(bad, ODD)
        setting = start(20.0, local, mode="hierarchical", ranks_per_node=ranks_per_node)
        found = setting.errors()
        meet()
        tell(**{name: found | {"check": setting.check()}})
        setting.group.close()


def another_config() -> None:
    """The processes do not agree on the group; then they do."""
    testing.initialize()
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    me = jax.process_index()
    config = smfree.EpConfig(**CONFIG | {"hidden": 16 + 16 * (me == ODD)}, timeout_s=10.0)
    try:
        smfree.EpGroup.create(mesh, config=config)
        tell(error=None)
    except smfree.SmfreeError as error:
        tell(error=str(error))
    meet()
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        assert_works_everywhere(group)
        meet()


def does_not_create(absent: int) -> None:
    """A process does not take part in the creation of the group; later it does."""
    testing.initialize()
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    if jax.process_index() != absent:
        begin = time.monotonic()
        try:
            smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG, timeout_s=2.0))
            tell(error=None)
        except smfree.SmfreeError as error:
            tell(error=str(error), seconds=time.monotonic() - begin)
    meet()
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        assert_works_everywhere(group)
        meet()
    tell(left=compat.distributed_client().key_value_dir_get("jax_smfree/group/"))


def creates_without_descriptors() -> None:
    """A process has as many files open as it may."""
    testing.initialize()
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if jax.process_index() == ODD:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, most))
    try:
        smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG, timeout_s=3.0))
        tell(error=None)
    except smfree.SmfreeError as error:
        tell(error=str(error))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    meet()
    with smfree.EpGroup.create(mesh, config=smfree.EpConfig(**CONFIG)) as group:
        assert_works_everywhere(group)
        meet()


def assert_works_everywhere(group: smfree.EpGroup) -> None:
    problem = make_problem(group.mesh)
    jax.block_until_ready(compiled(group, round_trip, problem)(*problem.arrays[:3]))


def pauses(seconds: float) -> None:
    """A process takes longer than the deadline, in a pause; the others go on to the next step."""
    setting = start(2.0)
    problem = setting.problem
    results = [setting.step(*problem.arrays[:3]) for _ in range(3)]
    begin = time.monotonic()
    with setting.group.pause():
        assert all(result.is_ready() for result in results)
        if jax.process_index() == ODD:
            time.sleep(seconds)
    tell(paused=time.monotonic() - begin)
    setting.tell_errors()
    setting.tell_check()
    meet()
    setting.group.close()


def dies_in_a_pause(directory: str) -> None:
    """The others wait for it at the end of theirs."""
    setting = start(60.0)
    begin = time.monotonic()
    try:
        with setting.group.pause():
            if jax.process_index() == ODD:
                os.kill(os.getpid(), signal.SIGKILL)
        tell(error=None)
    except smfree.SmfreeError as error:
        tell(error=str(error), seconds=time.monotonic() - begin)
    setting.group.close()
    leave(directory, [p for p in range(jax.process_count()) if p != ODD])
