# SPDX-License-Identifier: Apache-2.0
"""What ``dir(jax_smfree)`` shows, and so what TAB offers."""

import pkgutil

import pytest

import jax_smfree as smfree

pytestmark = pytest.mark.cpu_only

NOT_FROM_PYTHON = {"cli", "__main__", "_native", "_src"}


def test_dir_shows_all_there_is():
    modules = {module.name for module in pkgutil.iter_modules(smfree.__path__)}
    assert modules - NOT_FROM_PYTHON <= set(smfree.__all__)
    assert {"__version__", "__doc__", *smfree.__all__} <= set(dir(smfree))


@pytest.mark.parametrize("name", dir(smfree))
def test_what_it_shows_is_there(name):
    getattr(smfree, name)
