"""`python -m experiments.report RUNS...`: the table of runs, or of a sweep; with `--html`, `--pictures` and `--tables`
the comparison with intervals, verdicts and pictures."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command_line import Parser, stoppable
from experiments.errors import UsageError
from experiments.records import load_runs
from experiments.reporting.published import read_published
from experiments.reporting.runs_table import latency_table, sweep_table, with_notes

if TYPE_CHECKING:
    import pandas as pd

LIMITS = ("ttft", "tpot", "e2e")
"""Times of a request that `--slo` may limit."""

ENGINE = "provenance.sources.engine"
"""The hash of the code that ran."""


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.report", description="Print the table of finished runs.")
    parser.add_argument(
        "runs", nargs="*", help="run folders, folders of them, or files of sweeps (default: results/runs)"
    )
    parser.add_argument("--wide", action="store_true", help="all columns, whole run names, however wide the table is")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the comparison with pictures as one page")
    parser.add_argument(
        "--tables", type=Path, metavar="FOLDER", help="write it as Markdown and LaTeX, and all its numbers as CSV"
    )
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write its pictures as PNG, a file each")
    parser.add_argument("--margin", type=float, default=0.02, help="of non-inferiority to full KV (%(default)s)")
    parser.add_argument(
        "--slo", type=limits, default={}, metavar="LIMITS",
        help="seconds that a request may take to count in the goodput: ttft=2,tpot=0.05,e2e=60, or some of these",
    )  # fmt: skip
    parser.add_argument(
        "--ranking", action="store_true",
        help="print which policy wins at which budget and protection, with its differences; --tables writes it too",
    )  # fmt: skip
    parser.add_argument(
        "--any-engine", action="store_true",
        help="compare runs of different engine code too, which else have nothing to do with each other",
    )  # fmt: skip
    parser.add_argument("--published", metavar="NAME", help="a table of results/published to set beside ours")
    parser.add_argument("--title", default="Runs compared", help="of the page")
    options = parser.parse_args(arguments)
    paths = options.runs
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        published = None if options.published is None else read_published(options.published)
        runs = load_runs(paths or None)
        if runs.empty:
            print("no finished run", file=sys.stderr)
            return 1
        if options.any_engine:
            runs = runs.drop(columns=ENGINE, errors="ignore")
        if paths and all(Path(path).is_file() for path in paths):
            print(*(sweep_table(Path(path), options.wide) for path in paths), sep="\n\n")
        else:
            print(with_notes(runs, options.wide))
        if options.slo:
            from experiments.analysis.comparison import compare

            print("", latency_table(runs, options.wide, compare(runs, **options.slo)), sep="\n")
        if published or options.ranking or options.html or options.tables or options.pictures:
            _compare(runs, options, published)
    except (UsageError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def limits(text: str) -> dict[str, float]:
    """`ttft=2,tpot=0.05` as keywords of `compare`, in seconds."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if name not in LIMITS or not 0 < seconds < math.inf:
            raise argparse.ArgumentTypeError(f"{part!r}: must be {' or '.join(f'{name}=SECONDS' for name in LIMITS)}")
        found[name] = seconds
    return found


def _compare(runs: pd.DataFrame, options: argparse.Namespace, published: Mapping[str, Any] | None) -> None:
    """The published figures beside ours, the page, the pictures and the tables.

    Raises UsageError where they can't be written, ValueError for a wrong margin.
    """
    from experiments.analysis.comparison import compare
    from experiments.reporting.published import beside
    from experiments.reporting.tables import comparison_table, to_markdown, write_tables

    compared = compare(runs, options.margin, **options.slo)
    try:
        if published:
            print(f"\n{published['title']} ({published['source']})\n\n{to_markdown(beside(runs, compared, published))}")
        if options.tables:
            print("tables:", *write_tables(comparison_table(compared), options.tables, numbers=compared))
            if published:
                print("tables:", *write_tables(beside(runs, compared, published), options.tables, "published"))
        if options.ranking:
            _rank(runs, compared, options.tables)
        if options.pictures:
            from experiments.reporting.pictures import write_pictures

            print("pictures:", *write_pictures(runs, compared, options.pictures))
        if options.html:
            from experiments.reporting.page import page

            text = page(runs, options.margin, options.title, published, options.slo)
            options.html.parent.mkdir(parents=True, exist_ok=True)
            options.html.write_text(text, encoding="utf-8")
            print(f"page: {options.html}")
    except OSError as error:
        place = error.filename or options.html or options.tables or options.pictures
        raise UsageError(f"{place}: can't be written: {error.strerror}") from error


def _rank(runs: pd.DataFrame, compared: pd.DataFrame, folder: Path | None) -> None:
    """Which policy wins where, printed, and written as `ranking` too where there is a folder."""
    from experiments.analysis.ranking import ranking
    from experiments.reporting.ranking_table import standings, winners
    from experiments.reporting.tables import to_markdown, write_tables

    ranked = ranking(runs, compared)
    if ranked.empty:
        raise UsageError("--ranking: no evicting policy was graded or measured for fidelity")
    table = winners(runs, compared, ranked)
    for title, field in standings(runs, compared, ranked):
        print(f"\n{title}\n\n{to_markdown(field)}")
    print(f"\nthe best of each\n\n{to_markdown(table)}")
    if folder:
        numbers = ranked.join(runs.drop(columns=[name for name in ranked if name in runs]))
        print("tables:", *write_tables(table, folder, "ranking", numbers=numbers))


if __name__ == "__main__":
    sys.exit(main())
