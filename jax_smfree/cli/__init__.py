# SPDX-License-Identifier: Apache-2.0
"""The command line: one file per command, which reads options, calls the library, and shows.

Needs ``pip install 'jax_smfree[cli]'``. The work is done elsewhere in the package, so that it can
be done from Python as well.
"""

import click

import jax_smfree
from jax_smfree.cli.bench import bench
from jax_smfree.cli.doctor import doctor
from jax_smfree.cli.overlap import overlap
from jax_smfree.cli.plan import plan

__all__ = ["cli"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(jax_smfree.__version__, prog_name="jax-smfree")
def cli() -> None:
    """Expert-parallel dispatch and combine for JAX that leave the SMs to the compute."""


for _command in (doctor, overlap, plan, bench):
    cli.add_command(_command)
