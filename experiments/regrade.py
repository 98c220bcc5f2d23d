"""`python -m experiments.regrade RUNS...`: grade the recorded answers of finished runs again. Needs no model."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.analysis.metrics import accuracy
from experiments.command_line import Parser, stoppable
from experiments.config.check import OF_CHAINS, OF_TURNS
from experiments.errors import UsageError, one_line
from experiments.graders import get_grader, grade
from experiments.records import load_requests, load_runs

if TYPE_CHECKING:
    import pandas as pd

GRADED = ("run", "prompt_id", "sample_index", "grader", "old_grade", "grade", "extracted", "grader_error")


def regrade(run: pd.Series, grader: str | None = None, allow_code_execution: bool = False) -> pd.DataFrame:
    """The samples of a run, a row of `load_runs()`, graded again from the recorded output and gold.

    Args:
        run: a row of `load_runs()`.
        grader: its name; None takes the run's own, which is "none" where full KV's answers were fed to a policy.
        allow_code_execution: let the grader "code" run the programs in the answers.

    Returns:
        One row a sample, with the columns `GRADED`. A sample that was refused keeps its grade.

    Raises:
        UsageError: there is no such grader, it can't grade here or not such answers (those of a conversation or a chain
            are lists), or the record has no answers, as an archived copy.
    """
    import pandas as pd

    name = grader or ("none" if run.get("scenario.kind") == "fidelity" else run["workload.grader"])
    function = get_grader(name, allow_code_execution)
    _check_it_reads(name, run)
    try:
        requests = load_requests(run)
    except (OSError, ValueError) as error:
        raise UsageError(f"its samples can't be read ({one_line(error)})") from error
    lacking = [column for column in ("output", "gold") if column not in requests]
    if lacking:
        raise UsageError(
            f"the record has no {' and no '.join(lacking)}: it is a copy without texts; regrade the run it was made "
            "of, or copy that with `python -m experiments.archive RUN --texts`"
        )
    rows = []
    for sample in requests.to_dict("records"):
        row = {"run": run["run"], "prompt_id": sample["prompt_id"], "sample_index": sample["sample_index"]}
        old = sample["grade"] if pd.notna(sample["grade"]) else None
        row |= {"grader": name, "old_grade": old, "grade": old, "extracted": None, "grader_error": None}
        if pd.isna(sample["error"]):
            graded = grade(function, sample["output"], sample["gold"])
            row |= {"grade": graded.score, "extracted": graded.extracted, "grader_error": graded.error}
        rows.append(row)
    texts = dict.fromkeys(("extracted", "grader_error"), "string")
    return pd.DataFrame(rows, columns=list(GRADED)).astype({"old_grade": "float64", "grade": "float64"} | texts)


def _check_it_reads(grader: str, run: pd.Series) -> None:
    lengths = {name: run.get(f"workload.{name}") for name in ("turns", "chain")}  # NaN beside runs that have them
    given = {name: int(length) for name, length in lengths.items() if length is not None and length == length}
    for name, able in (("turns", OF_TURNS), ("chain", OF_CHAINS)):
        if name in given and grader not in able:
            raise UsageError(f"workload.grader={grader}: must be {' or '.join(able)} for workload.{name}={given[name]}")
    if grader == "turns" and "turns" not in given:
        raise UsageError("workload.grader=turns: must be another one for a run without workload.turns")


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns its exit code: 0 all runs were graded, 1 some were not, 2 wrong usage."""
    parser = Parser(
        prog="python -m experiments.regrade", description="Grade the recorded answers of finished runs again."
    )
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them")
    parser.add_argument("--grader", help="instead of each run's own")
    parser.add_argument("--allow-code-execution", action="store_true", help="let the grader `code` run the answers")
    parser.add_argument("--write", metavar="FILE.parquet", help="keep the new grades; without it nothing is written")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return _main(options)
    except UsageError as error:
        print(f"error: {_said(error)}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    import pandas as pd

    target = None if options.write is None else Path(options.write)
    if target is not None and (target.suffix != ".parquet" or not target.parent.is_dir()):
        raise UsageError(f"--write {target}: must be a .parquet file in a folder that exists")
    runs = load_runs(options.runs)
    if runs.empty:
        raise UsageError("no finished run in what was given")
    if options.grader is not None:
        get_grader(options.grader, options.allow_code_execution)
    tables = []
    for _, run in runs.iterrows():
        try:
            table = regrade(run, options.grader, options.allow_code_execution)
        except UsageError as error:
            print(f"error: {run['run']}: {_said(error)}", file=sys.stderr)
            continue
        changed = int((table["grade"].fillna(-1) != table["old_grade"].fillna(-1)).sum())
        old, new = (_percent(table[column]) for column in ("old_grade", "grade"))
        line = f"{run['run']}: {old} -> {new}, {changed} of {len(table)} grades changed"
        faults = table["grader_error"].dropna()
        print(line + (f"; {len(faults)} could not be graded, the first: {faults.iloc[0]}" if len(faults) else ""))
        tables.append(table)
    if target is not None and tables:
        _write(pd.concat(tables, ignore_index=True), target)
        print(f"written: {target}")
    return int(len(tables) < len(runs))


def _write(grades: pd.DataFrame, target: Path) -> None:
    """Write the file whole or not at all. Raises UsageError where it can't be written."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        grades.to_parquet(temporary, index=False)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"--write {target}: can't be written: {os.strerror(error.errno or 0)}") from error


def _said(error: UsageError) -> str:
    """The line as it reads for this command, which has flags for these options."""
    line = str(error).replace("workload.allow_code_execution=true", "--allow-code-execution")
    return line.replace("workload.grader=", "--grader ")


def _percent(grades: pd.Series) -> str:
    mean = accuracy(grades.dropna().tolist())
    return "ungraded" if mean is None else f"{mean:.1%}"


if __name__ == "__main__":
    sys.exit(main())
