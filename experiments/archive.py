"""`python -m experiments.archive RUNS... --to FOLDER`: small copies of finished runs, to be committed or sent.

A copy has everything that tables and intervals are computed from: config, provenance, metrics, and for each sample its
grade, lengths, times, facts and fidelity (of single tokens to two digits). Prompts, answers and their tokens stay
behind, and so do steps and events unless they are asked for: they are nearly all of a record's size. Files that were
given with their whole paths go by their names alone: a run's id covers their content.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments import records
from experiments.analysis.samples import read_samples
from experiments.command_line import Parser, stoppable
from experiments.errors import RunError, UsageError
from experiments.records.provenance import without_folders

logger = logging.getLogger(__name__)

TEXTS = ("prompt", "output", "output_token_ids")
"""Columns of `requests.parquet` that a copy leaves out."""

DIVERGENCES, LEAST_DIVERGENCE = "token_divergences", 1e-4
"""A column that a copy holds to two digits, and what it holds as 0."""


def archive(run: Path, folder: Path, steps: bool = False, events: bool = False, texts: bool = False) -> Path:
    """Copy the run at `run` into `folder`; a copy that is there is replaced.

    Args:
        steps, events: take `steps.parquet` and `events.parquet` along.
        texts: keep prompts and answers, without their tokens.

    Returns:
        The copy, a run folder as `load_runs` and `load_requests` read it.

    Raises:
        UsageError: the copy can't be written, or would replace the run itself.
    """
    target = folder / run.name
    if os.path.realpath(target) == os.path.realpath(run):
        raise UsageError(f"--to {folder}: holds {run.name} itself; give another folder")
    try:
        with records.claim(target) as staging:
            if (run / records.ROWS).exists():  # a benchmark is small
                shutil.copytree(run, staging, dirs_exist_ok=True)
                _copy_texts(run, staging)
                records.publish(staging, target, json.loads((run / records.METRICS).read_text(encoding="utf-8")))
                return target
            rows = pq.read_table(run / records.REQUESTS)
            left_out = ("output_token_ids",) if texts else TEXTS
            kept = _rounded(rows.drop_columns([name for name in left_out if name in rows.column_names]))
            pq.write_table(kept, staging / records.REQUESTS, compression="zstd")
            _copy_texts(run, staging)
            for name in [name for name, wanted in ((records.STEPS, steps), (records.EVENTS, events)) if wanted]:
                if (run / name).exists():
                    shutil.copyfile(run / name, staging / name)
            metrics = json.loads((run / records.METRICS).read_text(encoding="utf-8"))
            if "loop_rate" not in metrics:  # a record from before it was one; without the tokens it can't be told later
                metrics["loop_rate"] = read_samples(run, loops=True).loop_rate
            records.publish(staging, target, metrics)
    except OSError as error:
        raise UsageError(f"--to {folder}: can't be written: {error.strerror or error}") from error
    return target


def _copy_texts(run: Path, staging: Path) -> None:
    for name in (records.CONFIG, records.PROVENANCE):
        text = (run / name).read_text(encoding="utf-8")
        (staging / name).write_text(without_folders(text), encoding="utf-8")


def _rounded(rows: pa.Table) -> pa.Table:
    """Divergences of single tokens to two digits, and none below 1e-4: a fifth of the size, and sums stay to 0.02 %."""
    if DIVERGENCES not in rows.column_names:
        return rows
    column = rows[DIVERGENCES]
    lists = [
        values and [float(f"{x:.2g}") if x >= LEAST_DIVERGENCE else 0.0 for x in values]
        for values in column.to_pylist()
    ]
    return rows.set_column(rows.column_names.index(DIVERGENCES), DIVERGENCES, pa.array(lists, column.type))


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m experiments.archive", description="Copy finished runs without the texts of their samples."
    )
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the copies go")
    parser.add_argument("--steps", action="store_true", help="take the engine's steps along")
    parser.add_argument("--events", action="store_true", help="take compressions, pauses and preemptions along")
    parser.add_argument("--texts", action="store_true", help="keep prompts and answers")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        found, left_out = records.find_runs(options.runs)
        runs = []
        for run in found:
            if (reason := records.damage(run)) is None:
                runs.append(run)
            else:
                logger.warning("%s: left out, its record is damaged (%s)", run, reason)
                left_out += 1
        if not runs:
            raise UsageError("no finished and undamaged run in what was given")
        for number, run in enumerate(runs):
            try:
                archive(run, options.to, options.steps, options.events, options.texts)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{number} of {len(runs)} runs copied to {options.to}") from None
    except (UsageError, RunError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    copied = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{copied} copied to {options.to}" + f"; {left_out} incomplete or damaged left out" * bool(left_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
