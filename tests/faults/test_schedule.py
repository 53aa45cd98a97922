# SPDX-License-Identifier: Apache-2.0
"""Ranks that disagree, and tokens that are used twice, end in an error that says who did what."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

import jax_smfree as smfree
from faults.running import assert_fault, run
from support import backend

ODD = 1  # the rank that does something else
SECONDS = 5.0


def is_odd():
    return jax.lax.axis_index("ep") == ODD


@pytest.mark.cpu_only  # a GPU's sends take buffers of their own, whatever their token
def test_two_operations_on_one_lane(faulty):
    """A token that is used for two sends."""
    group = faulty()

    def local(token, x, topk_idx, topk_weights):
        first = smfree.dispatch_send(token, x, topk_idx, topk_weights)
        second = smfree.dispatch_send(token, 2 * x, topk_idx, topk_weights)
        # No rank receives the first before it has sent the second.
        first = dataclasses.replace(first, array=first.array + 0 * second.array)
        d, _ = smfree.dispatch_recv(first)
        e, _ = smfree.dispatch_recv(second)
        return d.x + e.x

    outcome = run(group, local)
    pattern = "two operations in flight on one lane.*Fix: receive it first"
    words = ("two operations in flight on one lane", "dispatch_send", "lane 0", "test_schedule.py:")
    assert_fault(group, outcome, pattern, words)
    sites = {site for e in outcome.errors for site in re.findall(r"test_schedule\.py:\d+", e)}
    assert len(sites) == 2
    assert outcome.seconds < SECONDS


def other_line(token, *arrays):
    return smfree.dispatch(token, *arrays)[0].x


def usual_line(token, *arrays):
    return smfree.dispatch(token, *arrays)[0].x


def test_another_call_site(faulty):
    """The same operation, but of another line of the program."""
    group = faulty(at_least=2)

    def local(token, *arrays):
        return jax.lax.cond(is_odd(), other_line, usual_line, token, *arrays)

    outcome = run(group, local)
    pattern = "schedule mismatch: rank .* expected .* and got .* from rank .*Fix"
    words = ("schedule mismatch", "lane 0", "number 0", "in other_line", "in usual_line")
    assert_fault(group, outcome, pattern, words)
    if backend() == "cpu":
        for error in outcome.errors:
            assert "in other_line" in error and "in usual_line" in error
    assert outcome.seconds < SECONDS


@pytest.mark.cpu_only  # a GPU's messages know lines: there both branches are one operation
def test_another_call_of_one_line(faulty):
    """Alike calls may come in any order, so only the deadline can tell that one does not come."""
    group = faulty(timeout_s=2.0)

    def local(token, x, *routing):
        def branch(factor):
            return lambda x: usual_line(token, factor * x, *routing)

        return jax.lax.cond(is_odd(), branch(2), branch(3), x)

    outcome = run(group, local)
    waits = (
        r"rank \d in dispatch_recv \(.*in usual_line, call (\d) of that line; .*\): "
        r"waited 2\.\d s for rank \d: nothing arrived; .*; unread from it: dispatch number 0 "
        r"\(.*, call (?!\1)\d of that line; .*\), which nothing here waits for "
        r"\(schedule mismatch\)"
    )
    assert_fault(group, outcome, waits, ("schedule mismatch", "lane 0", "in usual_line"))
    assert outcome.seconds < 4.0


def test_another_operation(faulty):
    """One rank dispatches where the others combine."""
    group = faulty(at_least=2)

    def local(token, *arrays):
        d, token = smfree.dispatch(token, *arrays)

        def again(token):
            return smfree.dispatch(token, *arrays)[0].x[:6]

        def back(token):
            return smfree.combine(token, d, d.x)[0]

        return jax.lax.cond(is_odd(), again, back, token)

    outcome = run(group, local)
    pattern = r"schedule mismatch.*expected \w+ number 1 .*got \w+ number 1"
    words = ("schedule mismatch", "lane 0", "number 1", "dispatch", "combine")
    assert_fault(group, outcome, pattern, words)
    if backend() == "cpu":
        for error in outcome.errors:
            assert {"dispatch number 1", "combine number 1"} == set(
                re.findall(r"(?:dispatch|combine) number 1", error)
            )
    assert outcome.seconds < SECONDS


def test_one_operation_more(faulty):
    """A loop of a length of its own: the others are gone, so only the deadline can tell."""
    group = faulty(timeout_s=2.0, at_least=2)

    def local(token, *arrays):
        def step(_, carry):
            token, total = carry
            d, token = smfree.dispatch(token, *arrays)
            return token, total + jnp.sum(d.x)

        zero = jax.lax.pcast(jnp.float32(0), "ep", to="varying")
        return jax.lax.fori_loop(0, 3 + is_odd(), step, (token, zero))[1][None]

    outcome = run(group, local)
    waits = (
        rf"rank {ODD} in dispatch_recv \(.* number 3\): waited 2\.\d s for rank 0: nothing "
        r"arrived; last from rank 0: dispatch number 2"
    )
    words = (rf"rank {ODD}", "dispatch_recv", "lane 0", "number 3", "in step")
    assert_fault(group, outcome, waits, words, ranks=[ODD])
    assert outcome.seconds < 4.0


def test_another_number_of_rows(faulty):
    """The same line with other shapes: what was expected and what came must not read the same."""
    group = faulty(at_least=2)

    def local(token, *arrays):
        def line(token, *arrays):
            return jnp.sum(smfree.dispatch(token, *arrays)[0].x)[None]

        def fewer(token, *arrays):
            return line(token, *(a[:3] for a in arrays))

        return jax.lax.cond(is_odd(), fewer, line, token, *arrays)

    outcome = run(group, local)
    assert_fault(
        group,
        outcome,
        "schedule mismatch.*expected .* and got .* from rank",
        ("schedule mismatch", "lane 0", "number 0", "dispatch"),
    )
    if backend() == "cpu":
        for error in outcome.errors:
            expected, got = re.search(r"expected (.*) and got (.*) from rank", error).groups()
            assert expected != got
    assert outcome.seconds < SECONDS
