"""`python -m experiments.simulate RECORD...`: what benchmarks and runs measured, simulated, and the errors.

`serve LOAD...`: loads of `scenario=serve_bench`; `fleet` and `capacity`: on replicas behind a router; `paper
RECORD...`: the paper's options on its own machine. `python -m experiments.run scenario=simulate` simulates one run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from experiments.command_line import Parser, stoppable
from experiments.errors import UsageError
from experiments.records import ROWS
from experiments.records.provenance import code_state
from experiments.simulation import fleet_command, paper, serve_command
from experiments.simulation.aims import aims_table
from experiments.simulation.errors import compared, error_table, load_table, machine_of_record
from experiments.simulation.machine import file_of, read_machine
from experiments.simulation.runs import compared_run, measured_runs, run_table
from experiments.simulation.served import compared_rates, is_served, served_table

COMMANDS = {
    "serve": serve_command.main,
    "fleet": fleet_command.fleet,
    "capacity": fleet_command.capacity,
    "paper": paper.main,
}


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is not None:
        try:
            return command(arguments[1:])
        except (UsageError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    parser = Parser(
        prog="python -m experiments.simulate",
        description="Simulate what was measured, and tell the errors; or: serve, fleet, capacity LOAD...",
    )
    parser.add_argument("records", nargs="+", type=Path, help="of benchmarks and runs, or folders of them")
    parser.add_argument("--machine", help="a name in conf/machine/ or a YAML file; without, that of the record's GPU")
    parser.add_argument("--trace", metavar="FILE", help="stands for the trace that runs took their lengths from")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args(arguments)
    code = code_state()  # it may change later
    rows, served, runs = [], [], []
    try:
        machine = None if options.machine is None else read_machine(options.machine)
        for folder in [folder for record in options.records for folder in _benchmarks(record)]:
            on = machine or machine_of_record(folder)
            if is_served(folder):
                for row in compared_rates(folder, on, options.trace):
                    served.append(row)
                    print(f"{len(served)}: {row['record']}", file=sys.stderr, flush=True)
                continue
            for row in compared(folder, on):
                rows.append(row)
                print(f"{len(rows)}: {row['record']} {row['load']}/{row['arm']}", file=sys.stderr, flush=True)
        for folder in [folder for record in options.records for folder in measured_runs(record)]:
            name = options.machine or file_of(machine_of_record(folder))
            with redirect_stdout(sys.stderr):
                runs.append(compared_run(folder, read_machine(name), name, options.trace))
        if options.out:
            content = {"what": "simulated beside measured", "arms": rows, "served": served, "runs": runs} | code
            options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tables = [error_table(rows), load_table(rows)] * bool(rows) + [served_table(served)] * bool(served)
    tables += [run_table(runs)] * bool(runs)
    kinds = {"engine_bench": rows, "serve_bench": served}
    kinds |= {kind: [run for run in runs if run.get("kind") == kind] for kind in ("whole runs", "steady runs")}
    print("\n\n".join([*tables, aims_table(kinds)]))
    return 0


def _benchmarks(record: Path) -> list[Path]:
    """The records of benchmarks in a folder, or the folder itself. Raises UsageError where is none, and no run."""
    found = sorted(path.parent for path in record.rglob(ROWS))
    if not found and not measured_runs(record):
        raise UsageError(f"{record}: holds no record of a benchmark, and no run on a GPU with outputs of given lengths")
    return found


if __name__ == "__main__":
    sys.exit(main())
