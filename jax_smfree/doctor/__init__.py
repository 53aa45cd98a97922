# SPDX-License-Identifier: Apache-2.0
"""Looks at this machine and installation for what the library needs, and says what to do.

examine        everything here, as a `Diagnosis`: a `Finding` per thing that was looked at
examine_links  what connects the hosts of a job, by really sending rows between its nodes

On the command line: ``jax-smfree doctor``, and ``--network`` in every process of a job.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from jax_smfree.doctor import devices, environment, network, software
from jax_smfree.doctor.findings import Diagnosis, Finding
from jax_smfree.doctor.links import examine as examine_links

__all__ = ["Diagnosis", "Finding", "examine", "examine_links"]


def examine(environ: Mapping[str, str] = os.environ) -> Diagnosis:
    """Looks at everything; starts JAX. Needs ``pip install 'jax_smfree[cli]'``.

    Args:
      environ: the environment variables to judge.

    Example:
      >>> from jax_smfree import doctor
      >>> [finding.name for finding in doctor.examine().problems]
      []
    """
    packages = software.installed()
    with devices.nvml() as library:
        gpus = devices.Gpus(library)
        access = gpus.peer_access()
        findings = (
            *software.versions(packages),
            *software.kernels(packages, len(gpus)),
            *gpus.findings(),  # before JAX takes its pool of GPU memory
            *devices.peer_findings(access),
            *devices.jax_devices(environ, len(gpus)),
            *software.build(len(gpus)),  # after JAX has started, when jaxlib knows our types
            *network.nvshmem(packages),
            *network.adapters(),
            *environment.gpu_settings(environ, len(gpus)),
            *environment.cpu_settings(),
        )
    return Diagnosis(findings, access)
