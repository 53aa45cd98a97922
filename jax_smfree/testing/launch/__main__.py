# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_smfree.testing.launch --processes 2 --devices-per-process 2 -- script.py args``.

Everything after ``--`` is a Python command line: ``-- script.py --flag``, ``-- -m package.module``.
Rank 0's output is shown while it runs, that of the others when something goes wrong.
"""

import argparse
import shutil
import signal
import sys
from types import FrameType
from typing import NoReturn

from jax_smfree.testing.launch.launcher import LaunchResult, launch


def main(argv: list[str] | None = None) -> int:
    """Runs the command line, and returns the exit code for the shell."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_smfree.testing.launch",
        description="Run a Python program as several JAX processes on this host. The program "
        "calls jax_smfree.testing.initialize() first.",
        epilog="Exit code: 0, or that of the rank that failed first (128 + signal when it was "
        "killed), or 124 when the deadline passed.",
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument(
        "--devices-per-process", type=int, metavar="N", help="default 2, with --platform cuda 1"
    )
    parser.add_argument("--platform", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS")
    parser.add_argument(
        "--log-dir", metavar="DIR", help="default: a temporary one, removed when all went well"
    )
    parser.add_argument(
        "program", nargs="+", metavar="-- PROGRAM", help="script.py args, or -m module args"
    )
    options = parser.parse_args(argv)
    devices = options.devices_per_process
    if devices is None:
        devices = 2 if options.platform == "cpu" else 1
    signal.signal(signal.SIGTERM, _exit)
    try:
        result = launch(
            options.program,
            processes=options.processes,
            devices_per_process=devices,
            platform=options.platform,
            timeout_s=options.timeout,
            log_dir=options.log_dir,
            follow=sys.stdout,
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not result.ok:
        print(result.summary(), file=sys.stderr)
    elif options.log_dir is None:
        shutil.rmtree(result.log_dir)
    return _exit_code(result)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the launcher the ordinary way, so that it ends its processes first."""
    sys.exit(128 + number)


def _exit_code(result: LaunchResult) -> int:
    if result.timed_out:
        return 124
    if result.first_failed is None:
        return 0
    code = result.processes[result.first_failed].returncode
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
