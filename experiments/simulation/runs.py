"""Records of runs on a GPU, simulated anew as their options say."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.config.compose import recorded
from experiments.config.schema import Experiment
from experiments.records import METRICS, read_config

COUNTED = ("steps", "preemptions", "pauses", "compressions")
TIMED = ("ttft", "e2e", "itl", "tpot")


def measured_runs(folder: Path) -> list[Path]:
    """Folders of finished runs of a served workload on a GPU that lie in a folder, or are it."""
    found = []
    for path in sorted(folder.rglob(METRICS)):
        try:
            config = read_config(path.parent)
            served = config["scenario"]["kind"] == "serve" and config["backend"] == "zipage"
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if served and config["sampling"]["ignore_eos"] and metrics.get("output_tokens_per_second"):
            found.append(path.parent)
    return found


def experiment_of(folder: Path, machine: str, trace: str | None) -> Experiment:
    """A run's options with a simulated engine. Raises UsageError where they are no longer options."""
    experiment = recorded(read_config(folder))
    workload = experiment.workload
    if trace is not None and "path" in workload.options:
        workload = replace(workload, options=workload.options | {"path": trace})
    scenario = replace(experiment.scenario, name="simulate", kind="simulate", machine=machine)
    return replace(experiment, workload=workload, scenario=scenario, force="true")


def simulate_run(folder: Path, machine: str, trace: str | None = None) -> dict[str, Any]:
    """The metrics of a simulated run. Raises RunError or UsageError as a run does."""
    from experiments.running import job

    with tempfile.TemporaryDirectory() as results:
        experiment = replace(experiment_of(folder, machine, trace), results_dir=results)
        made = job.run(experiment, shows=False)
        return json.loads((made / METRICS).read_text(encoding="utf-8"))
