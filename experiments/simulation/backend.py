"""The engine of `scenario=simulate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.backends import Backend, BackendFactory
from experiments.simulation.machine import Machine
from experiments.simulation.shape import SimulatedShape
from experiments.simulation.step_model import StepModel


def simulated(machine: Machine) -> BackendFactory:
    """Makes engines that are simulated on a machine. Raises UsageError for a model without a `config.json`."""

    def make(**options: Any) -> Backend:
        from zipage import SimulatedLLM

        shape = SimulatedShape.read(Path(options["model"]), options["dtype"], options["tensor_parallel_size"])
        times = StepModel(replace(machine, eager=options["enforce_eager"]), shape, options["block_size"])
        return SimulatedLLM(**options, times=times)

    return make
