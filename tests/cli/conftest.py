# SPDX-License-Identifier: Apache-2.0
"""Runs commands in this process: JAX starts once for all of them."""

from collections.abc import Callable

import click.testing
import pytest


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., click.testing.Result]:
    """``run("doctor", "--json", exit_code=0)``: a command, with its exit code checked."""
    import jax

    from jax_smfree.cli import cli

    jax.devices()  # with the devices of the tests, before a command asks for its own
    monkeypatch.setenv("COLUMNS", "120")
    # So that what a command sets is taken back after the test.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def call(*arguments: object, exit_code: int = 0) -> click.testing.Result:
        result = click.testing.CliRunner().invoke(cli, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == exit_code, result.output
        return result

    return call
