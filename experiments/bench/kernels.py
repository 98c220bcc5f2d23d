"""`scenario=kernels`: the kernels against what the machine can move and multiply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from experiments.backends import BackendFactory
from experiments.bench.kind import Keep, Measure
from experiments.config.schema import Experiment
from experiments.errors import UsageError


def prepare(experiment: Experiment, backends: Mapping[str, BackendFactory]) -> tuple[Any, Measure]:
    """As `experiments.bench.kind.Bench` says; it has no inputs beside its options, and all its rows come at once."""

    def measure(_keep: Keep) -> tuple[list[dict], dict]:
        from zipage import measure_kernels

        scenario = experiment.scenario
        try:
            report = measure_kernels(experiment.hardware.device, scenario.options, rounds=scenario.repeats)
        except ValueError as error:
            raise UsageError(f"scenario={scenario.name}: {error}") from error
        if report.ceilings is None:
            print("no CUDA device: small shapes, and no roofline to compare with", flush=True)
        ceilings = report.ceilings and asdict(report.ceilings)
        common = {"ceilings": ceilings, "device": report.device, "shapes": asdict(report.shapes)}
        return [asdict(row) for row in report.rows], common

    return None, measure
