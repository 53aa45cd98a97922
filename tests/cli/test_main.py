# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

import jax_smfree
from jax_smfree import __main__

pytestmark = pytest.mark.cpu_only


def test_the_package_is_a_program(tmp_path):
    command = [sys.executable, "-m", "jax_smfree", "--version"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == f"jax-smfree, version {jax_smfree.__version__}"


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_the_error_names_the_cure(monkeypatch, missing):
    for name in [n for n in sys.modules if n.startswith("jax_smfree.cli")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n == missing or n.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"'{missing}.*pip install 'jax_smfree\[cli\]'"):
        __main__.main()


def test_another_missing_module_is_not_hidden(monkeypatch):
    def broken(**_: object) -> None:
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    monkeypatch.setattr("jax_smfree.cli.cli", broken)
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        __main__.main()
