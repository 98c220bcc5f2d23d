"""Arms of `scenario=engine_bench`, simulated as they were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments.bench.loads import Arm
from experiments.bench.measure import Repeat, first_token, repeated, row_of, warm_up
from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.records import PROVENANCE, ROWS, read_config
from experiments.simulation.machine import Machine
from experiments.simulation.shape import SimulatedShape
from experiments.simulation.step_model import TIMED, StepModel
from zipage import CompressionTime, CompressionWork, SimulatedLLM, StepWork

Model = TypeVar("Model", bound=StepModel)


@dataclass(frozen=True)
class MeasuredArm:
    """An arm of Zipage's that was measured: what it was, and its row."""

    record: str
    arm: Arm
    row: dict[str, Any]


def measured_arms(folder: Path) -> list[MeasuredArm]:
    """Those of a record of `scenario=engine_bench` that Zipage answered and that were not refused.

    Raises:
        UsageError: it is no such record.
    """
    try:
        rows = json.loads((folder / ROWS).read_text(encoding="utf-8"))
        loads = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["inputs"]["loads"]
        path = Path(read_config(folder)["model"]["path"])
        answered = [(load, row) for load, row in zip(loads, rows, strict=True) if row["refused"] is None]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{folder}: no record of scenario=engine_bench") from error
    model = str(path if path.is_absolute() else ROOT / path)
    known = {field.name for field in fields(Arm)}
    found = []
    for load, row in answered:
        arm = Arm(**{name: value for name, value in load.items() if name in known})
        if arm.is_own:
            found.append(MeasuredArm(folder.name, replace(arm, options=arm.options | {"model": model}), row))
    return found


class Recorded(StepModel):
    """A model of time that keeps what it was asked."""

    def __init__(self, machine: Machine, shape: SimulatedShape, block_size: int) -> None:
        super().__init__(machine, shape, block_size)
        self.works: list[StepWork] = []
        self.compressions: list[tuple[int, CompressionWork]] = []
        """And after how many steps."""

    def step(self, work: StepWork) -> float:
        self.works.append(work)
        return super().step(work)

    def compression(self, work: CompressionWork) -> CompressionTime:
        self.compressions.append((len(self.works), work))
        return super().compression(work)


@dataclass(frozen=True)
class SimulatedArm:
    """What came of an arm.

    Attributes:
        row: as `scenario=engine_bench` would have it, and `simulated`.
        times: what the model was asked, in the whole of it.
        repeats: its measurements.
    """

    row: dict[str, Any]
    times: Recorded
    repeats: list[Repeat]

    def works(self) -> np.ndarray:
        """[TIMED, N], what the device's time depends on, of the steps that were measured."""
        numbers = [step.step for repeat in self.repeats for step in repeat.steps]
        return np.array([self.times.works[number][:TIMED] for number in numbers], dtype=np.float64).T

    def compressions(self) -> list[CompressionWork]:
        """Those of the steps that were measured."""
        first, last = self.repeats[0].steps[0].step, self.repeats[-1].steps[-1].step
        return [work for place, work in self.times.compressions if first < place <= last + 1]


def times_of(options: Mapping[str, Any], machine: Machine, kind: type[Model] = StepModel) -> Model:
    """The times of an engine's options on a machine. Raises UsageError for a model without a `config.json`."""
    ranks = options.get("tensor_parallel_size", 1)
    shape = SimulatedShape.read(Path(options["model"]), options.get("dtype", "auto"), ranks)
    machine = replace(machine, eager=machine.eager or options.get("enforce_eager", False))
    return kind(machine, shape, options.get("block_size", 256))


def started(options: Mapping[str, Any], times: StepModel) -> SimulatedLLM:
    """An engine. Raises ValueError where it can't be started so."""
    return SimulatedLLM(**{name: value for name, value in options.items() if name != "load_format"}, times=times)


def simulate_arm(arm: Arm, machine: Machine) -> SimulatedArm:
    """Run an arm on a machine that is simulated, as it is measured: the first repeat captures graphs that no warm-up
    asked for.

    Raises:
        RunError: as `experiments.bench.measure.measure`.
        ValueError: the engine can't be started so.
    """
    times = times_of(arm.options, machine, Recorded)
    llm, shape = started(arm.options, times), times.shape
    try:
        first_token(llm, arm, shape.sizes)
        warm_up(llm, arm, shape.sizes)
        repeats = repeated(llm, arm, shape.sizes)
    finally:
        llm.shutdown()
    return SimulatedArm(row_of(arm, shape.sizes, repeats, None) | {"simulated": machine.name}, times, repeats)
