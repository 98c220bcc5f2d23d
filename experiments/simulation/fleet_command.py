"""`python -m experiments.simulate fleet LOAD...` and `capacity LOAD...`: replicas behind a router."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.bench.serve_loads import ServedArm
from experiments.errors import UsageError
from experiments.records.provenance import code_state, simulate_command
from experiments.reporting.markdown import markdown
from experiments.simulation.capacity import bearable, dollars_per_million, gpus_needed, searched
from experiments.simulation.fleet import simulate_fleet
from experiments.simulation.machine import Machine, read_machine
from experiments.simulation.routers import ROUTERS
from experiments.simulation.serve_command import arms_of, load_parser

TRAFFIC = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def fleet(arguments: Sequence[str]) -> int:
    parser = load_parser("fleet", "Loads on replicas behind a router, simulated.")
    parser.add_argument("--replicas", nargs="+", type=int, default=[1], help="replicas of each arm's engine")
    parser.add_argument("--router", nargs="+", default=["least_tokens"], choices=sorted(ROUTERS))
    options = parser.parse_args(arguments)
    if not options.rates:
        raise UsageError("--rates: give requests a second, of the whole fleet")
    code = code_state()  # it may change later
    machine, rows = read_machine(options.machine), []
    for arm in arms_of(options):
        for replicas in options.replicas:
            for router in options.router:
                for rate in options.rates:
                    rows.append(simulate_fleet(arm, machine, replicas, router, rate))
                    _say(rows[-1])
    _keep(options, "fleet", arguments, machine, code | {"rows": rows})
    print(f"Simulated on {machine.name}; times in ms.\n\n{fleet_table(rows)}")
    return 0


def capacity(arguments: Sequence[str]) -> int:
    parser = load_parser("capacity", "The fewest GPUs that hold a load's limits, simulated.")
    parser.add_argument("--budgets", nargs="+", default=["full"], help="full, or tokens that zipage keeps")
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2], help="fleets whose highest rate is searched")
    parser.add_argument("--router", default="least_tokens", choices=sorted(ROUTERS))
    parser.add_argument("--low", type=float, default=0.5, help="requests a second for each GPU: the search begins here")
    parser.add_argument("--high", type=float, default=8.0, help="and ends here")
    parser.add_argument("--steps", type=int, default=4, help="bisections")
    parser.add_argument("--traffic", nargs="+", type=float, default=TRAFFIC, help="requests a second to say GPUs for")
    parser.add_argument("--price", type=float, default=2.5, help="dollars for an hour of a GPU")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="GPUs against traffic")
    options = parser.parse_args(arguments)
    code = code_state()  # it may change later
    machine, rows, borne, tokens = read_machine(options.machine), [], {}, 0.0
    for budget in options.budgets:
        name = "full KV" if budget == "full" else f"zipage {budget}"
        (arm,) = _arm(options, budget)
        tokens = sum(request.output_tokens for request in arm.requests) / len(arm.requests)
        borne[name] = {}
        for replicas in sorted(options.replicas):
            at, mine = partial(simulate_fleet, arm, machine, replicas, options.router), []
            for row in searched(at, options.low * replicas, options.high * replicas, options.steps):
                mine.append(row | {"name": name})
                _say(mine[-1])
            rows += mine
            most = bearable(mine)
            if most is not None and most >= options.high * replicas:
                raise UsageError(f"--high {options.high:g}: {name} bears as much a GPU, or more; search higher")
            if most is not None:
                borne[name][replicas * arm.gpus] = most
    borne = {name: fleets for name, fleets in borne.items() if fleets}
    if not borne:
        raise UsageError(f"--low {options.low}: no fleet holds the limits there; begin lower")
    needed = {name: {rate: gpus_needed(rate, fleets) for rate in options.traffic} for name, fleets in borne.items()}
    found = {"borne": borne, "needed": needed, "price": options.price, "output_tokens": tokens}
    _keep(options, "capacity", arguments, machine, code | found | {"rows": rows})
    print(f"Simulated on {machine.name}.\n\n{capacity_table(found)}")
    if options.picture:
        from experiments.simulation.pictures import gpus_against_traffic

        gpus_against_traffic(borne, machine.name).savefig(options.picture, dpi=150)
    return 0


def _arm(options: Namespace, budget: str) -> list[ServedArm]:
    if budget == "full":
        return arms_of(options, policy="full", budget_tokens=None, block_size=16)[:1]
    if not budget.isdecimal():
        raise UsageError(f"--budgets {budget}: must be full or a number of tokens")
    return arms_of(options, policy="zipage", budget_tokens=int(budget), block_size=256)[:1]


def _say(row: dict[str, Any]) -> None:
    verdict = "broken" if row["broken"] else "hold" if row["slo_holds"] else "do not hold"
    what = row.get("name", f"{row['load']}/{row['arm']}")
    print(f"{what} x {row['replicas']} at {row['rate']:g} requests/s: {verdict}", file=sys.stderr, flush=True)


def _keep(options: Namespace, what: str, arguments: Sequence[str], machine: Machine, content: dict[str, Any]) -> None:
    if options.out:
        head = {"what": f"{what}, simulated on {machine.name}", "simulated": vars(machine), "seed": options.seed}
        head |= {"command": simulate_command(what, arguments)}
        options.out.write_text(json.dumps(head | content, indent=1) + "\n", encoding="utf-8")


def fleet_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each fleet and rate, in Markdown; times in ms."""
    head = ["load", "GPUs", "router", "requests/s", "answered", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"]
    head += ["E2E p50", "E2E p99", "preemptions", "compressions", "tokens/s", "limits"]
    cells = []
    for row in rows:
        texts = [f"{row['load']}/{row['arm']}", str(row["gpus"]), row["router"], f"{row['rate']:g}"]
        texts += [f"{row['finished']} of {row['measured']}"]
        for name in ("ttft", "itl", "e2e"):
            texts += ["" if row[name] is None else f"{1e3 * row[name][share]:,.0f}" for share in ("p50", "p99")]
        texts += [f"{row[name]:,}" for name in ("preemptions", "compressions")]
        verdict = "broken" if row["broken"] else "hold" if row["slo_holds"] else "do not hold"
        cells.append([*texts, f"{row['tokens_per_second']:,.0f}", verdict])
    return markdown(head, cells)


def capacity_table(found: dict[str, Any]) -> str:
    """GPUs for each traffic, and dollars for a million output tokens, in Markdown."""
    names = list(found["needed"])
    head = ["requests/s", *[f"{name}: GPUs ($/M tokens)" for name in names]]
    cells = []
    for rate in next(iter(found["needed"].values())):
        line = [f"{rate:g}"]
        for name in names:
            gpus = found["needed"][name][rate]
            cost = dollars_per_million(rate, gpus, found["output_tokens"], found["price"])
            line.append(f"{gpus:,} ({cost:.2f})")
        cells.append(line)
    most = [[name, *[f"{gpus}: {rate:g}" for gpus, rate in fleets.items()]] for name, fleets in found["borne"].items()]
    widest = max(len(line) for line in most)
    held = markdown(["held", *[""] * (widest - 1)], [line + [""] * (widest - len(line)) for line in most])
    return f"{markdown(head, cells)}\n\nHighest rates that hold, by GPUs:\n\n{held}"
