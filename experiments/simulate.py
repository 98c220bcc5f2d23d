"""`python -m experiments.simulate RECORD...`: measured arms of `scenario=engine_bench`, simulated, and the errors.

`serve LOAD...`: loads of `scenario=serve_bench`. One run is simulated by `python -m experiments.run scenario=simulate`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.command_line import Parser, stoppable
from experiments.errors import UsageError
from experiments.records import ROWS
from experiments.simulation import serve_command
from experiments.simulation.errors import compared, error_table, machine_of_record
from experiments.simulation.machine import read_machine

COMMANDS = {"serve": serve_command.main}


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
        description="Simulate what was measured, and tell the errors; or: serve LOAD... (--help after it).",
    )
    parser.add_argument("records", nargs="+", type=Path, help="folders of scenario=engine_bench, or folders of them")
    parser.add_argument("--machine", help="a name in conf/machine/ or a YAML file; without, that of the record's GPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args(arguments)
    rows = []
    try:
        machine = None if options.machine is None else read_machine(options.machine)
        folders = [folder for record in options.records for folder in _benchmarks(record)]
        for folder in folders:
            for row in compared(folder, machine or machine_of_record(folder)):
                rows.append(row)
                print(f"{len(rows)}: {row['record']} {row['load']}/{row['arm']}", file=sys.stderr, flush=True)
        if options.out:
            content = {"what": "simulated arms of engine_bench beside measured ones", "rows": rows}
            options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(error_table(rows))
    return 0


def _benchmarks(record: Path) -> list[Path]:
    """The records of benchmarks in a folder, or the folder itself. Raises UsageError where there is none."""
    found = sorted(path.parent for path in record.rglob(ROWS))
    if not found:
        raise UsageError(f"{record}: holds no record of a benchmark")
    return found


if __name__ == "__main__":
    sys.exit(main())
