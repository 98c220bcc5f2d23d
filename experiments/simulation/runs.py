"""Records of runs on a GPU, simulated anew as their options say."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.config.compose import recorded
from experiments.config.schema import Experiment
from experiments.errors import RunError, UsageError, one_line
from experiments.records import METRICS, read_config
from experiments.reporting.markdown import markdown
from experiments.simulation.aims import figure, pair
from experiments.simulation.machine import Machine

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


def metrics_of(experiment: Experiment) -> dict[str, Any]:
    """Of a simulated run whose record is not kept. Raises RunError or UsageError as a run does."""
    from experiments.running import job

    with tempfile.TemporaryDirectory() as results:
        made = job.run(replace(experiment, results_dir=results), shows=False)
        return json.loads((made / METRICS).read_text(encoding="utf-8"))


def simulate_run(folder: Path, machine: str, trace: str | None = None) -> dict[str, Any]:
    """The metrics of a run, simulated. Raises as `metrics_of`."""
    return metrics_of(experiment_of(folder, machine, trace))


def compared_run(folder: Path, machine: Machine, name: str, trace: str | None) -> dict[str, Any]:
    """A run's figures, measured and simulated; `refused` says why it can't be simulated."""
    row = {"record": f"{folder.parent.name}/{folder.name}", "machine": machine.name}
    row["fitted"] = row["record"] in machine.origin.replace(",", " ").split()
    measured = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    try:
        simulated = simulate_run(folder, name, trace)
    except (RunError, UsageError) as error:
        return row | {"refused": one_line(error)}
    config = read_config(folder)
    speed = "output_tokens_per_second"
    figures = {"tokens_per_second": figure(measured[speed], simulated[speed])}
    figures |= {counted: figure(measured.get(counted), simulated.get(counted)) for counted in COUNTED}
    for timed in TIMED:
        for share in ("p50", "p99"):
            figures[f"{timed}.{share}"] = figure(measured[timed].get(share), simulated[timed].get(share))
    gpus = config["engine"]["tensor_parallel_size"]
    what = {"model": config["model"]["name"], "policy": config["policy"]["name"], "gpus": gpus}
    what["kind"] = "steady runs" if config["scenario"]["arrival"] == "steady" else "whole runs"
    return row | {"refused": None} | what | figures


def run_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; times as measured in seconds, and by how much the simulated ones are off."""
    shown = [f"{timed}.{share}" for timed in ("ttft", "e2e", "itl") for share in ("p50", "p99")]
    head = ["run", "policy", "GPUs", "tokens/s", "off", "steps off", "preemptions", "compressions"]
    head += [
        name.replace("ttft", "TTFT").replace("e2e", "E2E").replace("itl", "ITL").replace(".", " ") for name in shown
    ]
    cells = []
    for row in rows:
        if row["refused"] is not None:
            cells.append([row["record"], f"refused: {row['refused']}", *[""] * (len(head) - 2)])
            continue
        speed = row["tokens_per_second"]
        texts = [row["record"].rpartition("-")[2][:8] + f" {row['model']}", row["policy"], str(row["gpus"])]
        texts += [f"{speed['measured']:,.0f}", _off(speed), _off(row["steps"])]
        texts += [pair(row[name]) for name in ("preemptions", "compressions")]
        cells.append(texts + [_timed(row[name]) for name in shown])
    return markdown(head, cells)


def _off(figure: dict[str, Any]) -> str:
    return "" if figure["off"] is None else f"{figure['off']:+.1%}"


def _timed(figure: dict[str, Any]) -> str:
    return "" if figure["off"] is None else f"{figure['measured']:.3g} ({figure['off']:+.0%})"
