"""`python -m experiments.simulate serve LOAD...`: loads of `scenario=serve_bench` on a simulated server."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.backends import BACKENDS
from experiments.bench.serve_loads import ServedArm, read_served_arms
from experiments.command_line import Parser
from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.records.provenance import code_state, simulate_command
from experiments.reporting.markdown import markdown
from experiments.simulation.machine import read_machine
from experiments.simulation.serving import simulated_rows

HEAD = ["load", "requests/s", "sent", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "running", "waiting", "preemptions"]
HEAD += ["pauses", "compressions", "tokens/s", "limits"]


def given_options(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, the values as YAML has them. Raises UsageError for anything else."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{text}: must be the name of an option, = and its value")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{text}: the value is no YAML") from error
    return found


def load_parser(command: str, description: str) -> Parser:
    """Options of a command that puts loads of `scenario=serve_bench` on simulated servers."""
    parser = Parser(prog=f"python -m experiments.simulate {command}", description=description)
    parser.add_argument("loads", nargs="+", help="names in conf/serve_bench/, LOAD/ARM, or YAML files")
    parser.add_argument("--machine", default="h100", help="a name in conf/machine/ or a YAML file")
    parser.add_argument("--model", default="models/qwen3-8b-shape", help="a folder with a config.json")
    parser.add_argument("--trace", metavar="FILE", help="of a load that takes one")
    parser.add_argument("--rates", nargs="+", type=float, help="requests a second, in place of the load's search")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of the load")
    parser.add_argument("--engine", nargs="+", default=[], metavar="NAME=VALUE", help="options of EngineConfig")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    return parser


def arms_of(options: Namespace, **engine: Any) -> list[ServedArm]:
    """The arms of Zipage's that the options of `load_parser` name, with more options of `EngineConfig`.

    Raises:
        UsageError: there is none, or as `read_served_arms`.
    """
    changes = given_options(options.set)
    if options.rates:
        changes |= {"rates": options.rates, "search": None}
    model = Path(options.model)
    arms = read_served_arms(
        options.loads,
        model=str(model if model.is_absolute() else ROOT / model),
        load_format="dummy",
        has_tokenizer=False,
        given={"device": "cuda"} | given_options(options.engine) | engine,
        changes=changes,
        trace=options.trace,
        seed=options.seed,
        backends=BACKENDS,
    )
    arms = [arm for arm in arms if arm.backend == "zipage"]
    if not arms:
        raise UsageError(f"{', '.join(options.loads)}: no arm of Zipage's, and no other can be simulated")
    return arms


def main(arguments: Sequence[str]) -> int:
    options = load_parser("serve", "Loads of serve_bench, simulated.").parse_args(arguments)
    machine, arms, code = read_machine(options.machine), arms_of(options), code_state()
    rows = []
    for arm in arms:
        for row in simulated_rows(arm, machine):
            rows.append(row)
            print(f"{arm.title} at {row['rate']:g} requests/s: {_verdict(row)}", file=sys.stderr, flush=True)
    if options.out:
        head = {"what": f"serve_bench, simulated on {machine.name}", "simulated": vars(machine), "seed": options.seed}
        head |= {"command": simulate_command("serve", arguments)} | code
        options.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"Simulated on {machine.name}; times in ms.\n\n{serve_table(rows)}")
    return 0


def serve_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a rate, in Markdown; times in ms."""
    cells = []
    for row in rows:
        texts = [f"{row['load']}/{row['arm']}", f"{row['rate']:g}", str(row["sent"])]
        for name in ("ttft", "itl"):
            texts += ["" if row[name] is None else f"{1e3 * row[name][share]:,.1f}" for share in ("p50", "p99")]
        texts += ["" if row[name] is None else f"{row[name]:.1f}" for name in ("running", "waiting")]
        texts += [f"{row[name]:,}" for name in ("preemptions", "pauses", "compressions")]
        cells.append([*texts, f"{row['tokens_per_second']:,.0f}", _verdict(row)])
    return markdown(HEAD, cells)


def _verdict(row: dict[str, Any]) -> str:
    return "broken" if row["broken"] else "hold" if row["slo_holds"] else "do not hold"
