# SPDX-License-Identifier: Apache-2.0
"""What a compiled program overlaps, and what ran when.

overlap_report(compiled)    a report: the work between each send and its recv, and warnings
overlap(compiled)           one `Window` per send and its recv, to look into
orphans(compiled)           halves without their counterpart; an intact program has none
Timeline                    phases and copies that a group recorded on GPUs, also for Perfetto

``compiled`` is ``jax.jit(f).lower(...).compile()``, also for GPUs that are not there. On the
command line: ``jax-smfree overlap``.
"""

from jax_smfree.inspect.report import OverlapReport, orphans, overlap, overlap_report
from jax_smfree.inspect.timeline import Timeline
from jax_smfree.inspect.windows import Orphan, Step, Window

__all__ = [
    "Orphan",
    "OverlapReport",
    "Step",
    "Timeline",
    "Window",
    "orphans",
    "overlap",
    "overlap_report",
]
