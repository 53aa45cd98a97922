# SPDX-License-Identifier: Apache-2.0
"""Expert-parallel dispatch and combine for JAX that leave the SMs to the compute.

EpConfig, EpGroup      what the ranks agree on; the ranks
dispatch_send/recv     rows to the ranks of their experts, in two phases
combine_send/recv      results back, summed, in two phases
overlap, tie           compute that runs while rows move, forward and backward
dispatch, combine      both phases in one call, or with a recv hook
plan                   memory and times of a configuration, predicted
bench                  dispatch and combine timed here, against other ways
nn                     MoE layers
overlap_report         what a compiled program overlaps; more in inspect
doctor                 what this machine and installation lack
testing                tests over several processes

Names are loaded on first use (``__init__.pyi`` lists them): ``jax_smfree.testing`` is a pytest
plugin, and must not import JAX before the tests of other projects have configured it.
"""

import importlib.util

import lazy_loader

if importlib.util.find_spec(f"{__name__}._native") is None:
    raise ImportError(
        f"jax_smfree: got the source tree {__path__[0]}, which has no compiled module, expected an "
        "installed package. Install it with 'pip install .' and run from another folder, or use "
        "'pip install -e .'."
    )

__version__ = "0.1.0"

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
