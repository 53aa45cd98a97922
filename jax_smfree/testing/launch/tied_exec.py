# SPDX-License-Identifier: Apache-2.0
"""``tied_exec.py PARENT_PID PROGRAM ARGS...``: becomes PROGRAM, which dies with its parent.

A script of its own, run by a bare interpreter, and not a ``preexec_fn``: code between fork and exec
can deadlock in a process with threads, and JAX warns about forks.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Asks the kernel for SIGKILL at the parent's death, which outlives exec, and executes."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the request
        sys.exit(1)
    os.execv(program[0], program)


main()
