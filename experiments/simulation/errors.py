"""How far simulated arms of `scenario=engine_bench` are from measured ones."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import one_line
from experiments.records import PROVENANCE
from experiments.reporting.markdown import markdown
from experiments.simulation.aims import AIMS, figure, off, pair
from experiments.simulation.arms import MeasuredArm, measured_arms, simulate_arm
from experiments.simulation.machine import Machine, machine_names, read_machine

LATEST = "9999"
"""Later than every time."""
COUNTS = ("preemptions", "pauses", "compressions")
RATIOS = ("tokens_per_second", "steps", "mean_batch")


def machine_of_record(folder: Path) -> Machine:
    """The machine of `conf/machine/` whose name is in that of the record's GPU, an H100 where none is; of several the
    one that stands for engines of the record's time.
    """
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    gpus = provenance.get("hardware", {}).get("gpus") or ["H100"]
    kinds = {name.partition("_")[0] for name in machine_names()}
    kind = next((kind for kind in sorted(kinds) if kind.upper() in gpus[0].upper()), "h100")
    machines = [read_machine(name) for name in machine_names() if name.partition("_")[0] == kind]
    started = provenance.get("started", LATEST)
    return min((m for m in machines if m.until is None or started < m.until), key=lambda m: m.until or LATEST)


def compared(folder: Path, machine: Machine) -> Iterator[dict[str, Any]]:
    """A row for each arm of a record: what was measured, what is simulated, and by how much that is off."""
    for measured in measured_arms(folder):
        row = {
            "record": measured.record if measured.record.startswith("engine_bench") else _name(folder),
            "load": measured.arm.load,
            "arm": measured.arm.name,
            "gpus": measured.arm.options.get("tensor_parallel_size", 1),
            "machine": machine.name,
            "fitted": _is_fitted(machine, folder, measured),
        }
        try:
            simulated = simulate_arm(measured.arm, machine).row
        except Exception as error:  # an arm costs no other
            yield row | {"refused": one_line(error)}
            continue
        yield row | {"refused": None} | _figures(measured, simulated)


def _figures(measured: MeasuredArm, simulated: dict[str, Any]) -> dict[str, Any]:
    theirs = measured.row
    figures = {name: figure(theirs[name], simulated[name]) for name in RATIOS}
    figures["tokens_per_second"] |= {"lowest": min(theirs["repeats"]), "highest": max(theirs["repeats"])}
    for name in ("p50", "p99"):
        figures[f"step_ms.{name}"] = figure(theirs["step_ms"][name], simulated["step_ms"][name])
    figures |= {name: figure(theirs.get(name), simulated[name]) for name in COUNTS}
    return figures


def _is_fitted(machine: Machine, folder: Path, measured: MeasuredArm) -> bool:
    """Whether the machine's constants come of this arm too, as its `origin` says."""
    return any(
        name in (folder.name, f"{folder.name}/{measured.arm.name}") for name in machine.origin.replace(",", " ").split()
    )


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def error_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ["record", "arm", "fitted", "tokens/s", "simulated", "off", "steps off", "p50 off"]
    head += [f"{name}, measured / simulated" for name in COUNTS]
    cells = []
    for row in rows:
        names = [row["record"].removeprefix("engine_bench_"), f"{row['load']}/{row['arm']}", "yes" * row["fitted"]]
        if row["refused"] is not None:
            cells.append([*names, f"refused: {row['refused']}", *[""] * (len(head) - 4)])
            continue
        speed = row["tokens_per_second"]
        texts = [f"{speed['measured']:,.0f}", f"{speed['simulated']:,.0f}", f"{speed['off']:+.1%}"]
        texts += [f"{row['steps']['off']:+.1%}", f"{row['step_ms.p50']['off']:+.1%}"]
        texts += [pair(row[name]) for name in COUNTS]
        cells.append(names + texts)
    return markdown(head, cells)


def load_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each load and number of GPUs, in Markdown; of the arms that nothing was fitted to."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["refused"] is None and not row["fitted"]:
            groups.setdefault((row["load"], row["gpus"]), []).append(row)
    cells = []
    for (load, gpus), group in sorted(groups.items()):
        speeds = [row["tokens_per_second"]["off"] for row in group]
        within = sum(abs(speed) <= AIMS["tokens_per_second"] for speed in speeds)
        texts = [load, str(gpus), str(len(group)), f"{statistics.median(speeds):+.1%}"]
        texts += [f"{min(speeds):+.1%} to {max(speeds):+.1%}", f"{within} of {len(group)}"]
        for name in ("steps", "preemptions", "compressions"):
            found = [value for row in group if (value := off(row[name])) is not None]
            texts.append(f"{sum(value <= AIMS[name] for value in found)} of {len(found)}")
        cells.append(texts)
    head = ["load", "GPUs", "arms", "tokens/s off, median", "all", "within 3 %", "steps within 2 %"]
    return markdown([*head, "preemptions", "compressions"], cells)
