# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu COMMAND``."""

from __future__ import annotations

import argparse
import os

import jax

from benchmarks import results
from benchmarks.gpu import (
    decode,
    deepep,
    kernels,
    layer,
    matmul,
    nodes,
    operations,
    processes,
    quick,
)

COMMANDS = (operations, quick, layer, decode, deepep, processes, nodes, kernels, matmul)
SMOKE_DEVICES = 4  # where there are no GPUs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure dispatch and combine on GPUs."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        assert module.__doc__
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        command.set_defaults(run=module.run, show_all=module.show_all)
    options = parser.parse_args()
    if options.load:
        options.show_all(results.load(options.load), options.load)
        return
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", SMOKE_DEVICES)
    options.run(options)


if __name__ == "__main__":
    main()
