# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of what the command line is made of."""

import doctest
import importlib

import numpy as np
import pytest

import jax_smfree as smfree
from jax_smfree import plan

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize(
    "module", ["doctor", "inspect.report", "inspect.timeline", "plan.prediction", "plan.routing"]
)
def test_examples_run(module):
    found = importlib.import_module(f"jax_smfree.{module}")
    names = {"np": np, "plan": plan, "smfree": smfree}
    result = doctest.testmod(found, extraglobs=names)
    assert result.attempted and not result.failed
