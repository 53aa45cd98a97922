# SPDX-License-Identifier: Apache-2.0
"""Sends rows between all pairs of nodes of a job, and says how that went.

Collective: every process of the job runs it, under the launcher that will run the training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_smfree as smfree
from jax_smfree._src import bootstrap
from jax_smfree.doctor import network
from jax_smfree.doctor.findings import Diagnosis, Finding
from jax_smfree.testing import initialize

_TOPIC, _WHERE = "links", "doctor --network"
_TIMEOUT_S = 60.0
_WIDTH = 1024  # float32: rows of 4 KiB
_LARGE_ROWS = 4096
_PORTABLE_ROWS = 256  # every message has room for all rows, whoever they go to
_REPEATS = 3
_GOES_WRONG = 'See docs/multihost.md, "What goes wrong"; NVSHMEM_DEBUG=INFO says more.'

_Pair = tuple[int, int]  # ranks, of different nodes


def examine(environ: Mapping[str, str] = os.environ) -> Diagnosis:
    """What connects the hosts, and a small and a large round trip between each pair of nodes.

    The result is the same in all processes.

    Args:
      environ: the environment variables to judge.

    Example:
      >>> from jax_smfree import doctor
      >>> [finding.value for finding in doctor.examine_links().problems]  # one process
      ['1']
    """
    initialize()
    if jax.process_count() == 1:
        cure = (
            "Run it in every process of the job, by its launcher: srun jax-smfree doctor "
            "--network, or mpirun jax-smfree doctor --network."
        )
        return Diagnosis((Finding(_TOPIC, "processes", "1", "problem", cure),))
    mine = {
        "host": bootstrap.host_name(),
        "findings": [dataclasses.asdict(finding) for finding in network.settings(environ)],
        "adapters": [dataclasses.asdict(finding) for finding in network.adapters()],
    }
    hellos = _share(mine)
    hosts = [hello["host"] for hello in hellos]
    of_host = {hello["host"]: hello for hello in reversed(hellos)}  # by its first process
    findings = [Finding(**finding) for finding in hellos[0]["findings"]]
    findings.append(Finding(_TOPIC, "processes", _listed(hosts)))
    for host in dict.fromkeys(hosts):
        for adapter in of_host[host]["adapters"]:
            findings.append(Finding(**(adapter | {"name": f"{host}: {adapter['name']}"})))
    findings += _try_links(hosts)
    return Diagnosis(tuple(findings))


def _share(mine: Any) -> list[Any]:
    """Collective: what each process brings."""
    processes = list(range(jax.process_count()))
    texts = bootstrap.exchange(
        _WHERE, "jax_smfree/doctor", json.dumps(mine), processes, jax.process_index(), _TIMEOUT_S
    )
    return list(map(json.loads, texts))


def _listed(hosts: list[str]) -> str:
    counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    return f"{len(hosts)}: " + ", ".join(f"{count} on {host}" for host, count in counts.items())


def _try_links(hosts: list[str]) -> Iterator[Finding]:
    mesh = Mesh(np.array(jax.devices()), ("rank",))
    ranks = mesh.size
    rows = _LARGE_ROWS if jax.default_backend() == "gpu" else _PORTABLE_ROWS
    config = smfree.EpConfig(
        num_experts=ranks, top_k=1, hidden=_WIDTH, max_tokens=rows, recv_capacity=rows,
        dtype=jnp.float32, timeout_s=_TIMEOUT_S, differentiable=False,
    )  # fmt: skip
    try:
        group = smfree.EpGroup.create(mesh, "rank", config=config)
    except (smfree.SmfreeError, ValueError) as error:
        yield Finding(_TOPIC, "group", str(error), "problem", _GOES_WRONG)
        return
    per_node = group.config.ranks_per_node or ranks
    mode = f"{group.backend}, {group.config.mode}, nodes of {per_node}"
    yield Finding(_TOPIC, "group", f"{ranks} ranks, {mode}")
    if per_node == ranks:
        yield Finding(_TOPIC, "nodes", "one: no rows of this job cross a network")
        group.close()
        return
    pairs = list(itertools.combinations(range(0, ranks, per_node), 2))
    names = [hosts[device.process_index] for device in mesh.devices.flat]
    try:
        seen = _share(_round_trips(group, rows, pairs))
    finally:
        group.close()
    for number, pair in enumerate(pairs):
        name = " ↔ ".join(f"{names[rank]} (rank {rank})" for rank in pair)
        yield _finding(name, rows, [process[number] for process in seen])


def _round_trips(group: smfree.EpGroup, rows: int, pairs: list[_Pair]) -> list[dict[str, Any]]:
    """By pair: seconds of a round trip of one row and of ``rows``, how many came back wrong here.

    The first error is that of its pair, and nothing goes after it.
    """
    outcomes: list[dict[str, Any]] = []
    error = ""
    for pair in pairs:
        outcome: dict[str, Any] = {"seconds": [], "wrong": 0, "error": error, "tried": not error}
        if not error:
            try:
                for count in (1, rows):
                    seconds, wrong = _round_trip(group, count, pair)
                    outcome["seconds"].append(seconds)
                    outcome["wrong"] += wrong
                group.check()
            except (smfree.SmfreeError, jax.errors.JaxRuntimeError) as fault:
                outcome["error"] = error = str(fault)
        outcomes.append(outcome)
    return outcomes


def _round_trip(group: smfree.EpGroup, rows: int, pair: _Pair) -> tuple[float, int]:
    """The fastest of a few, in seconds, and how many rows of this process were wrong."""
    ranks = group.num_ranks
    sharding = NamedSharding(group.mesh, P("rank"))
    x = np.random.default_rng(0).random((ranks, rows, _WIDTH), np.float32)
    peers = np.full((ranks, rows, 1), -1, np.int32)
    for rank, peer in (pair, pair[::-1]):
        peers[rank] = peer  # rank r has expert r

    def local(x: Array, topk_idx: Array) -> tuple[Array, Array]:
        d, token = smfree.dispatch(group.token(), x[0], topk_idx[0])
        out, _ = smfree.combine(token, d, d.x, weights=None)
        return d.x[None], out[None]

    on_ranks = jax.shard_map(local, mesh=group.mesh, in_specs=P("rank"), out_specs=P("rank"))
    step = jax.jit(on_ranks)
    arrays = [_put(value, sharding) for value in (x, peers)]
    jax.block_until_ready(step(*arrays))  # compiles
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        received, returned = jax.block_until_ready(step(*arrays))
        times.append(time.perf_counter() - start)

    swapped = dict([pair, pair[::-1]])
    expected = {rank: x[peer] for rank, peer in swapped.items()}
    wrong = _wrong_rows(received, expected) + _wrong_rows(
        returned, {rank: x[rank] for rank in pair}
    )
    return min(times), wrong


def _put(value: np.ndarray, sharding: NamedSharding) -> Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _wrong_rows(found: Array, expected: Mapping[int, np.ndarray]) -> int:
    """How many of the first rows of this process's ranks differ from what was expected."""
    wrong = 0
    for shard in found.addressable_shards:
        rank = shard.index[0].start or 0
        if rank in expected:
            rows = np.asarray(shard.data)[0, : len(expected[rank])]
            wrong += int(np.any(rows != expected[rank], axis=1).sum())
    return wrong


def _finding(name: str, rows: int, seen: list[dict[str, Any]]) -> Finding:
    """What the processes say of a pair."""
    if not all(process["tried"] for process in seen):
        return Finding(_TOPIC, name, "not tried, after the error above", "warning", _GOES_WRONG)
    if errors := list(dict.fromkeys(process["error"] for process in seen if process["error"])):
        return Finding(_TOPIC, name, "; ".join(errors), "problem", _GOES_WRONG)
    if wrong := sum(process["wrong"] for process in seen):
        return Finding(_TOPIC, name, f"{wrong} rows arrived wrong", "problem", _GOES_WRONG)
    one, all_rows = (max(process["seconds"][i] for process in seen) for i in (0, 1))
    megabytes = rows * _WIDTH * 4 / 1e6
    # There and back: so much twice, in each direction.
    rate = 2 * megabytes / 1e3 / all_rows
    value = (
        f"right; a row there and back in {one * 1e6:,.0f} µs, {megabytes:.0f} MB each way at "
        f"{rate:.2f} GB/s"
    )
    return Finding(_TOPIC, name, value)
