# SPDX-License-Identifier: Apache-2.0
"""Hosts for a test, where this machine can have any, and the report of a run."""

import pytest

from network import hosts as namespaces
from network import lab as labs
from network.report import Report


def pytest_addoption(parser):
    parser.addoption(
        "--network-results", metavar="FILE", help="write what the tests of tests/network found"
    )


def pytest_configure(config):
    path = config.getoption("--network-results", None)
    if path and not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist
        config.pluginmanager.register(Report(path, config.invocation_params.args))


@pytest.fixture
def hosts(tmp_path):
    """Two of them, and nothing is left of them; see `network.hosts`."""
    if reason := namespaces.missing():
        pytest.skip(reason)
    with namespaces.two_hosts(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """The directory of a stand-in for GDRCopy."""
    directory = tmp_path_factory.mktemp("stand_in")
    labs.build_stand_in(directory)
    return directory


@pytest.fixture
def lab(request, tmp_path):
    """See `network.lab`: for the backend under test."""
    why_one_host = namespaces.missing()
    if request.config.getoption("--backend") == "cpu":
        if why_one_host:
            pytest.skip(why_one_host)
        return labs.Lab(tmp_path, None, two_hosts=True)
    if reason := labs.missing():
        pytest.skip(reason)
    return labs.Lab(tmp_path, request.getfixturevalue("stand_in"), why_one_host is None)
