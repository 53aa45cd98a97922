# SPDX-License-Identifier: Apache-2.0
"""Measures dispatch and combine, and other JAX ways to do the same, in turn on the same rows.

Shape           what is measured
measure         times of the phases, the round trip, its overlap with compute, and the peers

On the command line: ``jax-smfree bench``, a quick look at one shape. The record, with its grids of
shapes and machines, is made by ``benchmarks/`` in a clone.
"""

from jax_smfree.bench.cases import Shape
from jax_smfree.bench.measure import measure

__all__ = ["Shape", "measure"]
