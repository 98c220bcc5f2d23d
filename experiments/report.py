"""`python -m experiments.report RUNS...`: the table of runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.errors import UsageError
from experiments.records import load_runs

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
    """The runs as a Markdown table, padded so that it reads well in a terminal too."""
    headings = [heading for heading, _ in COLUMNS.values()]
    own = {
        "policy": [_policy(run) for _, run in runs.iterrows()],
        "budget": [_budget(run) for _, run in runs.iterrows()],
        "tpot.p50": runs["tpot.p50"].astype(float) * 1000,
    }
    shown = runs.assign(**own)
    cells = [
        [_cell(row.get(column), template) for column, (_, template) in COLUMNS.items()] for _, row in shown.iterrows()
    ]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    lines = [headings, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def never_bound(run: pd.Series) -> bool:
    """Whether a row of `load_runs()` is a run that could evict and never did."""
    value = run.get("budget_never_bound")  # absent or NaN in records from before there was eviction
    return not _missing(value) and bool(value)


def _policy(run: pd.Series) -> str:
    name, protection = run["policy.name"], run["policy.protection"]
    return name if name == "full" or protection == "none" else f"{name} + {protection}"


def _budget(run: pd.Series) -> str:
    if run["policy.name"] == "full":
        return "-"
    return _cell(run["policy.budget_tokens"], "{:.0f}") + " (never bound)" * never_bound(run)


def _cell(value: object, template: str) -> str:
    return "-" if _missing(value) else template.format(value)


def _missing(value: object) -> bool:
    return value is None or value != value  # NaN


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Print the table of finished runs."
    )
    parser.add_argument("runs", nargs="*", help="run folders, or folders of them (default: results/runs)")
    paths = parser.parse_args(arguments).runs
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        runs = load_runs(paths or None)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if runs.empty:
        print("no finished run", file=sys.stderr)
        return 1
    print(runs_table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
