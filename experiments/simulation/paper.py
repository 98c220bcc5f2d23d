"""`python -m experiments.simulate paper RECORD...`: the paper's options on another machine, and its ingredients.

Each model has a recorded run of full KV and one of `zipage`. Both are simulated on the machine given, in as much memory
as the record had, and `zipage` again without one ingredient at a time: hybrid scheduling, asynchronous compression, and
graphs, without which steps are launched kernel by kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.command_line import Parser
from experiments.config.schema import Experiment
from experiments.errors import UsageError
from experiments.records import METRICS, read_config
from experiments.records.provenance import code_state, simulate_command
from experiments.reporting.markdown import markdown
from experiments.simulation.machine import read_machine
from experiments.simulation.runs import experiment_of, measured_runs, metrics_of

PUBLISHED = "249 to 277 % (published)"
BASES = ("full KV", "zipage")


def _as_paper(experiment: Experiment) -> Experiment:
    """Compressions beside steps, hybrid scheduling, graphs."""
    policy = replace(experiment.policy, scheduling="hybrid", async_compression=True)
    return replace(experiment, policy=policy, engine=replace(experiment.engine, enforce_eager=False))


INGREDIENTS = {
    "without hybrid": lambda e: replace(e, policy=replace(e.policy, scheduling="constrained")),
    "without async": lambda e: replace(e, policy=replace(e.policy, async_compression=False)),
    "without graphs": lambda e: replace(e, engine=replace(e.engine, enforce_eager=True)),
}


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m experiments.simulate paper", description="The paper's options on a simulated machine."
    )
    parser.add_argument("records", nargs="+", type=Path, help="runs of full KV and of zipage, of several models")
    parser.add_argument("--machine", default="a100_80gb", help="a name in conf/machine/ or a YAML file")
    parser.add_argument("--trace", metavar="FILE", help="stands for the trace that runs took their lengths from")
    parser.add_argument("--models", nargs="+", help="names of models; without, all")
    parser.add_argument("--seconds", type=float, help="of the steady state, in place of the records'")
    parser.add_argument("--ingredients", action="store_true", help="also without one ingredient at a time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args(arguments)
    code = code_state()  # it may change later
    machine, rows = read_machine(options.machine), []
    for model, runs in pairs([folder for record in options.records for folder in measured_runs(record)]).items():
        if options.models and model not in options.models:
            continue
        rows.append(_row(model, runs, options.machine, options.trace, options.seconds, options.ingredients))
        print(f"{model}: {rows[-1]['simulated']}", file=sys.stderr, flush=True)
    if options.out:
        head = {"what": f"the paper's options, simulated on {machine.name}", "simulated": vars(machine)}
        head |= {"command": simulate_command("paper", arguments)} | code
        options.out.write_text(json.dumps(head | {"published": PUBLISHED, "rows": rows}, indent=1) + "\n")
    print(f"Simulated on {machine.name}; the paper: {PUBLISHED}, A100s, its own loads.\n\n{paper_table(rows)}")
    return 0


def pairs(folders: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Model -> its runs of full KV and of zipage, the first of each, compressions beside decodes as in the paper.

    Raises:
        UsageError: no model has both.
    """
    found: dict[str, dict[str, Path]] = {}
    for folder in folders:
        config = read_config(folder)
        name = {"full": "full KV", "zipage": "zipage"}.get(config["policy"]["name"])
        if name is not None and config["engine"]["enable_prefix_caching"] and config["policy"]["async_compression"]:
            found.setdefault(config["model"]["name"], {}).setdefault(name, folder)
    whole = {model: runs for model, runs in found.items() if set(BASES) <= set(runs)}
    if not whole:
        raise UsageError("no model among the records has both a run of full KV and one of zipage")
    order = {model: json.loads((runs["zipage"] / METRICS).read_text())["memory"] for model, runs in whole.items()}
    return dict(sorted(whole.items(), key=lambda item: order[item[0]]["weight_bytes"]))


def _row(
    model: str, runs: dict[str, Path], machine: str, trace: str | None, seconds: float | None, ingredients: bool
) -> dict[str, Any]:
    def timed(name: str, experiment: Experiment) -> float:
        if seconds is not None:
            experiment = replace(experiment, scenario=replace(experiment.scenario, seconds=seconds))
        with redirect_stdout(sys.stderr):
            rates[name] = metrics_of(experiment)["output_tokens_per_second"]
        return rates[name]

    rates: dict[str, float] = {}
    measured = {name: json.loads((runs[name] / METRICS).read_text())["output_tokens_per_second"] for name in BASES}
    for name in BASES:
        timed(name, _as_paper(experiment_of(runs[name], machine, trace)))
    if ingredients:
        zipage = _as_paper(experiment_of(runs["zipage"], machine, trace))
        for name, change in INGREDIENTS.items():
            timed(name, change(zipage))
    return {"model": model, "measured": measured, "simulated": rates}


def paper_table(rows: Sequence[dict[str, Any]]) -> str:
    """Tokens a second and percent of full KV, measured on the records' machine and simulated, in Markdown."""
    more = [name for name in INGREDIENTS if any(name in row["simulated"] for row in rows)]
    head = [
        "model",
        "measured: % of full KV",
        "simulated: full KV, tokens/s",
        "zipage, tokens/s",
        "% of full KV",
        *more,
    ]
    cells = []
    for row in rows:
        real, ours = row["measured"], row["simulated"]
        texts = [row["model"], f"{real['zipage'] / real['full KV']:.0%}", f"{ours['full KV']:,.0f}"]
        texts += [f"{ours['zipage']:,.0f}", f"{ours['zipage'] / ours['full KV']:.0%}"]
        texts += [f"{ours[name] / ours['full KV']:.0%}" if name in ours else "" for name in more]
        cells.append(texts)
    return markdown(head, cells)
