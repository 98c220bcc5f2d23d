"""Records of `scenario=serve_bench`, simulated: the same requests at the rates that were measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.backends import BACKENDS
from experiments.bench.serve import served_arms
from experiments.bench.serve_loads import ServedArm
from experiments.config.compose import recorded
from experiments.config.schema import Experiment
from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.records import PROVENANCE, ROWS, content_hash, read_config
from experiments.reporting.markdown import markdown
from experiments.running.models import find_model
from experiments.simulation.aims import figure, pair
from experiments.simulation.machine import Machine
from experiments.simulation.serving import simulate_rate

LOADS = ROOT / "results" / "records" / "serve_loads"
"""Loads as they were when they were measured, where `conf/serve_bench/` has changed since."""
COUNTED = ("preemptions", "pauses", "compressions")
TIMES = ("ttft", "e2e", "itl")


@dataclass(frozen=True)
class MeasuredRate:
    """An arm of Zipage's at a rate, as measured: what it was, and its row."""

    record: str
    arm: ServedArm
    row: dict[str, Any]


def is_served(folder: Path) -> bool:
    """Whether a folder is a record of `scenario=serve_bench`. Raises OSError where it has no config."""
    return read_config(folder)["scenario"]["kind"] == "serve_bench"


def measured_rates(folder: Path, trace: str | None = None) -> list[MeasuredRate]:
    """Those of a record of `scenario=serve_bench` at which Zipage was measured, but for closed loops.

    Args:
        trace: stands for the file that the record took its requests from.

    Raises:
        UsageError: an option of the record is none any more, neither its load nor one of `LOADS` is the one measured,
            or it is another trace.
    """
    rows = json.loads((folder / ROWS).read_text(encoding="utf-8"))
    rows = [row for row in rows if row["backend"] == "zipage" and row["refused"] is None and row["streams"] is None]
    if not rows:
        return []
    experiment = recorded(read_config(folder))
    if experiment.scenario.path is not None and trace is not None:
        experiment = replace(experiment, scenario=replace(experiment.scenario, path=trace))
    arms = _arms_as_measured(experiment, folder)
    return [MeasuredRate(folder.parent.name, arms[row["load"], row["arm"]], row) for row in rows]


def _arms_as_measured(experiment: Experiment, folder: Path) -> dict[tuple[str, str], ServedArm]:
    """By load and name. The record holds no more of its loads than their hash, which tells whether these are they."""
    hashed = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["inputs"]["loads"]
    model, names = find_model(experiment.model), experiment.scenario.loads
    for loads in [names, *_former(names)]:
        arms = served_arms(replace(experiment, scenario=replace(experiment.scenario, loads=loads)), model, BACKENDS)
        arms = [arm for arm in arms if {arm.load, f"{arm.load}/{arm.name}"} & set(names) or loads == names]
        if content_hash([arm.plain() for arm in arms]) == hashed:
            return {(arm.load, arm.name): arm for arm in arms}
    raise UsageError("the loads are no longer those that were measured, or the trace is another")


def _former(names: Sequence[str]) -> list[list[str]]:
    """The files of `LOADS` that one load's name may have meant."""
    stems = {name.partition("/")[0] for name in names}
    return [[str(path)] for path in sorted(LOADS.rglob("*.yaml")) if stems == {path.stem}]


def compared_rates(folder: Path, machine: Machine, trace: str | None) -> Iterator[dict[str, Any]]:
    """A row for each rate of a record: what was measured, what is simulated, and by how much that is off; or one whose
    `refused` says why it can't be simulated.
    """
    try:
        rates = measured_rates(folder, trace)
    except UsageError as error:
        yield {"record": f"{folder.parent.name}/{folder.name}", "machine": machine.name, "refused": str(error)}
        return
    fitted = folder.parent.name in machine.origin.replace(",", " ").split()
    for measured in rates:
        real = measured.row
        ours = simulate_rate(measured.arm, machine, real["rate"])
        row = {
            "record": measured.record,
            "arm": real["arm"],
            "rate": real["rate"],
            "machine": machine.name,
            "refused": None,
        }
        row["fitted"] = fitted
        row["tokens_per_second"] = figure(real["tokens_per_second"], ours["tokens_per_second"])
        row |= {name: figure(real[name], ours[name]) for name in COUNTED}
        for name in TIMES:
            for share in ("p50", "p99"):
                row[f"{name}.{share}"] = figure((real[name] or {}).get(share), (ours[name] or {}).get(share))
        yield row | {name: {"measured": real[name], "simulated": ours[name]} for name in ("broken", "slo_holds")}


def served_table(rows: Sequence[dict[str, Any]]) -> str:
    """Measured / simulated, in Markdown; times in ms but E2E."""
    head = ["record", "arm", "requests/s", "tokens/s", "off", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"]
    head += ["E2E p50, s", "E2E p99, s", "preemptions", "compressions", "limits hold"]
    cells = []
    for row in rows:
        if row["refused"] is not None:
            cells.append([row["record"].removeprefix("serve_trace_"), f"refused: {row['refused']}", *[""] * 12])
            continue
        speed, holds = row["tokens_per_second"], row["slo_holds"]
        texts = [row["record"].removeprefix("serve_trace_"), row["arm"], f"{row['rate']:g}", pair(speed, "{:,.0f}")]
        texts.append(f"{speed['off']:+.1%}")
        texts += [pair(row[f"{name}.{share}"], "{:,.0f}", 1e3) for name in ("ttft", "itl") for share in ("p50", "p99")]
        texts += [pair(row[f"e2e.{share}"], "{:.1f}") for share in ("p50", "p99")]
        texts += [pair(row[name]) for name in ("preemptions", "compressions")]
        cells.append([*texts, " / ".join("yes" if holds[name] else "no" for name in ("measured", "simulated"))])
    return markdown(head, cells)
