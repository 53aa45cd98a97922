# SPDX-License-Identifier: Apache-2.0
"""Starts, watches and ends the processes of a multi-process program on this host.

launcher.py    `launch`, and what it returns
arguments.py   its arguments: how a program is named, what is refused
processes.py   the processes themselves: environment, logs, process groups, signals
tied_exec.py   what each process starts as, so that it cannot outlive its parent
__main__.py    the command line
"""

from jax_smfree.testing.launch.launcher import LaunchError, LaunchResult, ProcessResult, launch

__all__ = ["LaunchError", "LaunchResult", "ProcessResult", "launch"]
