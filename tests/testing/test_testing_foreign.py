# SPDX-License-Identifier: Apache-2.0
"""Sessions of other projects, on a machine where jax_smfree is installed: nothing changes."""

import importlib.metadata

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.cpu_only

FOREIGN = """
import sys

def test_theirs():
    names = {name.partition(".")[0] for name in sys.modules}
    assert "_jax_smfree_pytest" in names
    assert not names & {"jax", "jaxlib", "numpy", "lazy_loader", "jax_smfree"}
"""
LAUNCHERS = [
    {},
    {"JAX_PROCESS_ID": "0"},
    {"JAX_NUM_PROCESSES": "many"},
    {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    | {"SLURM_LOCALID": "1"},
    {f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "LOCAL_RANK")}
    | {"OMPI_COMM_WORLD_SIZE": "2"},
]


@pytest.fixture
def run_foreign(pytester, monkeypatch):
    """Runs pytest with this plugin and no other, under the variables of a launcher."""

    def run(environ, *args):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        return pytester.runpytest_subprocess("-p", "_jax_smfree_pytest", "--strict-markers", *args)

    return run


def test_it_is_what_pytest_loads():
    entry_points = importlib.metadata.entry_points(group="pytest11")
    assert {e.value for e in entry_points if e.name == "jax_smfree"} <= {"_jax_smfree_pytest"}


@pytest.mark.parametrize("environ", LAUNCHERS, ids=lambda environ: next(iter(environ), "none"))
def test_a_session_without_the_mark(pytester, run_foreign, environ):
    pytester.makepyfile(FOREIGN)
    result = run_foreign(environ)
    result.assert_outcomes(passed=1)
    assert result.ret == 0
    assert "multihost" not in result.stdout.str() + result.stderr.str()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "*got JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS*"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"},
            "*JAX_PROCESS_ID='x', expected a number*",
        ),
    ],
)
def test_variables_are_looked_at_for_a_marked_test(pytester, run_foreign, environ, message):
    pytester.makepyfile("import pytest\n@pytest.mark.multihost\ndef test_it(): pass")
    result = run_foreign(environ)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_a_marked_test_that_is_not_selected_opens_nothing(pytester, run_foreign):
    pytester.makepyfile(FOREIGN + "import pytest\n@pytest.mark.multihost\ndef test_ours(): pass")
    result = run_foreign({"JAX_PROCESS_ID": "0"}, "-k", "theirs")
    result.assert_outcomes(passed=1, deselected=1)
