# SPDX-License-Identifier: Apache-2.0
"""The rates of a machine that a plan is made with, given or measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_smfree._src import arguments

PHASES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")


@dataclasses.dataclass(frozen=True)
class PhaseCost:
    """What a phase takes beside its bytes at the rate of a copy.

    Attributes:
      fixed_us: time with no rows at all: launches and routing.
      efficiency: its rate over that of a copy: what else uses the memory meanwhile, as the copy
        engines do under a send, and how well it bears a mixture of reads and writes.
    """

    fixed_us: float
    efficiency: float

    def __post_init__(self) -> None:
        arguments.number("PhaseCost", "fixed_us", self.fixed_us)
        arguments.positive("PhaseCost", "efficiency", self.efficiency)


# What reading a file of another kind raises.
_NOT_RESULTS = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    ArithmeticError,
    np.linalg.LinAlgError,
)


_H200 = {
    "dispatch_send": PhaseCost(21.5, 0.722),
    "dispatch_recv": PhaseCost(18.5, 0.934),
    "combine_send": PhaseCost(15.2, 0.812),
    "combine_recv": PhaseCost(8.3, 0.91),
}


_RATE = "a positive rate, in units as its name says"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates per GPU. The defaults are those of an H200.

    NVLink, memory, matrix products and phases are what `from_results` makes of
    ``benchmarks/results/gpu-nvidia-h200-x2.json``; the network is a 400 Gb/s adapter per GPU, not
    measured.

    Attributes:
      nvlink_gb_s: rate to the GPUs of its node, in each direction.
      network_gb_s: rate to other nodes, in each direction.
      hbm_gb_s: rate of its memory, bytes read plus bytes written.
      matmul_tflop_s: rate of large matrix products.
      phases: the cost of each phase, by name.
    """

    nvlink_gb_s: float = 378.0
    network_gb_s: float = 50.0
    hbm_gb_s: float = 3968.4
    matmul_tflop_s: float = 696.6
    phases: Mapping[str, PhaseCost] = dataclasses.field(default_factory=lambda: dict(_H200))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "phases":
                value = getattr(self, field.name)
                arguments.positive("Machine", field.name, value, _RATE)
        arguments.instance("Machine", "phases", self.phases, Mapping)  # type: ignore[type-abstract]
        costs = [self.phases.get(name) for name in PHASES]
        if not all(isinstance(cost, PhaseCost) for cost in costs):
            raise TypeError(
                f"Machine: got phases of {sorted(map(str, self.phases))}, expected a PhaseCost "
                f"for each of {', '.join(PHASES)}."
            )

    @classmethod
    def from_results(cls, results: Mapping[str, Any], **given: float) -> Machine:
        """From what ``python -m benchmarks.gpu operations`` wrote; ``given`` rates come first.

        The costs of a phase are those with the least relative squares over the shapes.

        Raises:
          ValueError, TypeError: for another file, or one in which a rate is missing and not given.
        """
        arguments.instance(
            "Machine.from_results",
            "results",
            results,
            Mapping,  # type: ignore[type-abstract]
        )
        names = {field.name for field in dataclasses.fields(cls)} - {"phases"}
        if unknown := given.keys() - names:
            raise TypeError(
                f"Machine.from_results: got {', '.join(sorted(unknown))}, expected some of "
                f"{', '.join(sorted(names))}."
            )
        for name, value in given.items():
            arguments.positive("Machine.from_results", name, value, _RATE)
        try:
            measured = {
                "hbm_gb_s": results["copy_rate"]["gb_s"],
                "matmul_tflop_s": results["gemms"]["tflop_s"],
            }
            link = results["link_ceilings"].get("large")
            measured |= {"nvlink_gb_s": link["all_to_all"]} if link else {}
            rates = {"network_gb_s": cls.network_gb_s} | measured | given
            rates["nvlink_gb_s"]  # not in runs of one GPU, nor where there was no nvcc
            shapes = list(results["shapes"].values())
            with np.errstate(all="raise"):
                phases = {name: _fit(shapes, name, rates["hbm_gb_s"]) for name in PHASES}
        except _NOT_RESULTS as error:
            raise ValueError(
                f"Machine: got results without {error}, expected the JSON file of a complete run "
                "of `python -m benchmarks.gpu operations`."
            ) from error
        return cls(**rates, phases=phases)

    def phase_us(self, name: str, num_bytes: float) -> float:
        """The time of a phase that reads and writes so many bytes in all."""
        cost = self.phases[name]
        return cost.fixed_us + num_bytes / (1e3 * self.hbm_gb_s * cost.efficiency)


def _fit(shapes: list[Any], phase: str, hbm_gb_s: float) -> PhaseCost:
    """The measured times as a line over those that the bytes take at the rate of a copy."""
    found = [shape["movers"]["default"]["phases"][phase] for shape in shapes]
    us = np.array([phase["p50"] for phase in found])
    floor_us = np.array([phase["bytes"] for phase in found]) / hbm_gb_s / 1e3
    # Errors relative to the time, or small shapes count nothing.
    lines = np.stack([np.ones_like(us), floor_us], axis=1) / us[:, None]
    (fixed_us, slope), *_ = np.linalg.lstsq(lines, np.ones_like(us), rcond=None)
    return PhaseCost(round(float(fixed_us), 1), round(float(1 / slope), 3))
