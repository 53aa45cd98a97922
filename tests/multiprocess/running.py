# SPDX-License-Identifier: Apache-2.0
"""Runs a program of `programs` in several processes, and collects what they told."""

import json
import re

from jax_smfree.testing import launch


def run(program, *args, log_dir, processes=2, devices=2, platform="cpu"):
    """What each process told, and how it ended."""
    result = launch(
        program,
        args=args,
        processes=processes,
        devices_per_process=devices,
        platform=platform,
        timeout_s=120,
        survivors_s=None,
        log_dir=log_dir,
    )
    assert not result.timed_out, result.summary()
    told = []
    for process in result.processes:
        told.append({})
        for line in re.findall("^TOLD (.*)$", process.text, re.MULTILINE):
            told[-1] |= json.loads(line)
    return told, result


def assert_all_match(errors, pattern):
    for error in errors:
        assert error is not None and re.search(pattern, error), (error, pattern)
