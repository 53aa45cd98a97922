# SPDX-License-Identifier: Apache-2.0
"""What a configuration will take on a machine that need not be there.

predict      memory, bytes per link and times for one number of ranks
sweep        the same for several, direct against hierarchical
Machine      the rates, given or measured
Routing      uniform, or a sample of what a real router chose

It is a model: bytes over rates, and a measured cost per phase. docs/command_line.md says how far
off it was. On the command line: ``jax-smfree plan``.
"""

from jax_smfree.plan.machine import Machine, PhaseCost
from jax_smfree.plan.prediction import Mode, Prediction, predict, sweep
from jax_smfree.plan.routing import Routing

__all__ = ["Machine", "Mode", "PhaseCost", "Prediction", "Routing", "predict", "sweep"]
