"""`python -m experiments.report RUNS...`: the table of runs, or of a sweep; with `--html` and `--tables` the comparison
with intervals, verdicts and pictures."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config.notes import notes_on
from experiments.config.options import budget_texts, readable_options, told_apart
from experiments.errors import UsageError
from experiments.records import load_runs
from experiments.reporting.published import read_published

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "run": ("run", "{}"),
    "workload.name": ("workload", "{}"),
    "policy": ("policy", "{}"),
    "budget": ("budget", "{}"),
    "samples": ("samples", "{:.0f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "facts_known": ("facts", "{:.1%}"),
    "output_tokens_per_second": ("output tok/s", "{:,.1f}"),
    "output_length.mean": ("mean output", "{:.0f}"),
    "ttft.p50": ("TTFT p50 (s)", "{:.3f}"),
    "tpot.p50": ("TPOT p50 (ms)", "{:.1f}"),
    "peak_blocks": ("peak blocks", "{:.0f}"),
    "compressions": ("compressions", "{:.0f}"),
    "errors": ("errors", "{:.0f}"),
}
"""Column of `load_runs()`, or of the table's own, -> its heading, its format."""


def runs_table(runs: pd.DataFrame) -> str:
    """The runs as a Markdown table, padded so that it reads well in a terminal too.

    Budgets are those that held. Each option in which the runs differ has a column behind the budget.
    """
    columns, options = list(COLUMNS.items()), told_apart(runs)
    place = list(COLUMNS).index("budget") + 1
    columns[place:place] = [(option, (option, "{}")) for option in options]
    if runs["model.name"].nunique() > 1:
        columns.insert(1, ("model.name", ("model", "{}")))
    headings = [heading for _, (heading, _) in columns]
    own = {
        "policy": [_policy(run) for _, run in runs.iterrows()],
        "budget": budget_texts(runs) + [" (never bound)" * never_bound(run) for _, run in runs.iterrows()],
        "tpot.p50": runs["tpot.p50"].astype(float) * 1000,
    }
    shown = runs.assign(**own, **readable_options(runs, options))
    cells = [[_cell(row.get(column), template) for column, (_, template) in columns] for _, row in shown.iterrows()]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    lines = [headings, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def sweep_table(path: Path) -> str:
    """The finished runs of a sweep, given by its file.

    Raises:
        UsageError: the file is not the record of a sweep.
    """
    runs = load_runs(path)
    if runs.empty:
        return "no finished run"
    return with_notes(runs)


def with_notes(runs: pd.DataFrame) -> str:
    """`runs_table`, and below it a line for each thing that must be known to read it."""
    notes = [*notes_on(runs), *filter(None, [mixture(runs)])]
    return "\n".join([runs_table(runs), *(f"note: {line}" for line in notes)])


def mixture(runs: pd.DataFrame) -> str | None:
    """In which code rows of `load_runs()` differ that look alike in a table, in a line; None where they don't.

    A record from before there were hashes of the code counts by its commit.
    """
    said = []
    commits = runs.reindex(columns=["provenance.code.commit"]).astype(str).iloc[:, 0]
    for part, owner in (("engine", "backend"), ("policy", "policy.name"), ("grader", "workload.grader")):
        hashes = runs.reindex(columns=[f"provenance.sources.{part}"]).astype(object).iloc[:, 0].fillna(commits)
        for name, alike in hashes.groupby(runs.reindex(columns=[owner]).iloc[:, 0]):
            if alike.nunique() > 1:
                said.append(f"{alike.nunique()} versions of the {part} {name}")
    if not said:
        return None
    return f"these rows were made by {', '.join(said)}: the code is a part of what differs between them"


def never_bound(run: pd.Series) -> bool:
    """Whether a row of `load_runs()` is a run that could evict and never did."""
    value = run.get("budget_never_bound")  # absent or NaN in records from before there was eviction
    return not _missing(value) and bool(value)


def _policy(run: pd.Series) -> str:
    name, protection = run["policy.name"], run["policy.protection"]
    return name if name == "full" or protection == "none" else f"{name} + {protection}"


def _cell(value: object, template: str) -> str:
    return "-" if _missing(value) else template.format(value)


def _missing(value: object) -> bool:
    return value is None or value != value  # NaN


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Print the table of finished runs."
    )
    parser.add_argument(
        "runs", nargs="*", help="run folders, folders of them, or files of sweeps (default: results/runs)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the comparison with pictures as one page")
    parser.add_argument(
        "--tables", type=Path, metavar="FOLDER", help="write it as Markdown and LaTeX, and all its numbers as CSV"
    )
    parser.add_argument("--margin", type=float, default=0.02, help="of non-inferiority to full KV (%(default)s)")
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
        if paths and all(Path(path).is_file() for path in paths):
            print(*(sweep_table(Path(path)) for path in paths), sep="\n\n")
        else:
            print(with_notes(runs))
        if published or options.html or options.tables:
            _compare(runs, options, published)
    except (UsageError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _compare(runs: pd.DataFrame, options: argparse.Namespace, published: Mapping[str, Any] | None) -> None:
    """The published figures beside ours, the page and the tables.

    Raises UsageError where they can't be written, ValueError for a wrong margin.
    """
    from experiments.analysis.comparison import compare
    from experiments.reporting.published import beside
    from experiments.reporting.tables import comparison_table, to_markdown, write_tables

    compared = compare(runs, options.margin)
    try:
        if published:
            print(f"\n{published['title']} ({published['source']})\n\n{to_markdown(beside(runs, compared, published))}")
        if options.tables:
            print("tables:", *write_tables(comparison_table(compared), options.tables, numbers=compared))
            if published:
                print("tables:", *write_tables(beside(runs, compared, published), options.tables, "published"))
        if options.html:
            from experiments.reporting.page import page

            text = page(runs, options.margin, options.title, published)
            options.html.parent.mkdir(parents=True, exist_ok=True)
            options.html.write_text(text, encoding="utf-8")
            print(f"page: {options.html}")
    except OSError as error:
        raise UsageError(
            f"{error.filename or options.html or options.tables}: can't be written: {error.strerror}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
