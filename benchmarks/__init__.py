# SPDX-License-Identifier: Apache-2.0
"""What was measured, and the programs that measured it. They run in a clone.

cpu/          ``python -m benchmarks.cpu``: dispatch and combine on CPU devices
gpu/          ``python -m benchmarks.gpu COMMAND``: on GPUs; without a command it lists them
cuda/         plain CUDA kernels: what links and memory can do without the library
results/      JSON with one line per case, and tables and pictures made of it

What both packages use: ``machine`` (where it ran), ``results`` (files), ``report`` (Markdown),
``plot``, ``apart`` (in new processes), ``ragged_way`` (a peer). What a user measures with
``jax-smfree bench`` is `jax_smfree.bench`, and is used here as well.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# ``python -m`` and ``-c`` put the clone first on the path, where jax_smfree lacks its native module
# unless the installation is an editable one. So what is installed, or on PYTHONPATH, comes first.
sys.path.sort(key=lambda entry: entry in ("", str(ROOT)))
