"""Finished runs as a table for a terminal: 110 columns at most, what all rows share said once, the conclusion last."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.analysis.metrics import PERCENTILES
from experiments.config.notes import notes_on
from experiments.config.options import budget_texts, in_order, readable_options, short_names, simulated, told_apart
from experiments.records import load_runs
from experiments.reporting.conclusion import RECORDED_ONLY, conclusions
from experiments.reporting.markdown import markdown

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 110
LONGEST = 24
"""Characters of a cell, unless the table is wide."""
WHOLE = ("budget", "place_accuracy")
"""Columns whose cells are never cut."""
RARE = ("place_accuracy", "recall_accuracy", "fidelity.divergence", "fidelity.agreement")
"""Columns that are there where a run has such a figure, also in a wide table."""


@dataclass(frozen=True)
class Column:
    """A column of `load_runs()`, or of the table's own.

    Attributes:
        wide: its heading where there is room.
        leaves: the higher, the earlier it is left out where there is none; 0: never.
        shared: whether a value that all rows have may be said above the table instead.
    """

    heading: str
    template: str = "{}"
    wide: str | None = None
    leaves: int = 0
    shared: bool = False


COLUMNS = {
    "run": Column("run"),
    "model.name": Column("model", leaves=2, shared=True),
    "workload.name": Column("workload", leaves=1, shared=True),
    "policy": Column("policy"),
    "budget": Column("budget"),
    "samples": Column("samples", "{:.0f}", leaves=8, shared=True),
    "accuracy": Column("accuracy", "{:.1%}"),
    "place_accuracy": Column("by place", wide="by place (%)", leaves=3),
    "recall_accuracy": Column("recall", "{:.1%}", leaves=3),
    "fidelity.divergence": Column("KL", "{:.4f}", wide="KL (nats/token)"),
    "fidelity.agreement": Column("agree", "{:.1%}", wide="agreement"),
    "facts_known": Column("facts", "{:.1%}", leaves=7),
    "output_tokens_per_second": Column("tokens/s", "{:,.1f}", wide="output tok/s"),
    "output_length.mean": Column("output", "{:.0f}", wide="mean output", leaves=6),
    "ttft.p50": Column("TTFT s", "{:.3f}", wide="TTFT p50 (s)", leaves=10),
    "tpot.p50": Column("TPOT ms", "{:.1f}", wide="TPOT p50 (ms)", leaves=11),
    "peak_blocks": Column("blocks", "{:.0f}", wide="peak blocks", leaves=5),
    "compressions": Column("compr.", "{:.0f}", wide="compressions", leaves=9),
    "errors": Column("errors", "{:.0f}", leaves=4, shared=True),
}
SIMULATED = ", simulated"
OPTION = Column("", leaves=3)
"""An option in which the runs differ; its columns stand behind the budget."""


def runs_table(runs: pd.DataFrame, wide: bool = False, columns: Mapping[str, Column] = COLUMNS) -> str:
    """The runs as a Markdown table: full KV first in each workload, then by policy and budget.

    Budgets are those that held. Each option in which the runs differ has a column. At most `WIDTH` columns of text
    unless it is `wide`: values that all rows share stand in a line above, columns that don't fit are named below.
    """
    runs, options = in_order(runs), told_apart(runs)
    columns = dict(columns)
    if runs["model.name"].nunique() <= 1:
        del columns["model.name"]
    columns = _insert(columns, "budget", {option: _of_option(option, short_names(options)) for option in options})
    rows = [run for _, run in runs.iterrows()]
    own = {
        "policy": [_policy(run) + SIMULATED * is_simulated for run, is_simulated in zip(rows, simulated(runs))],
        "budget": budget_texts(runs) + [" (never bound)" * never_bound(run) for run in rows],
        "tpot.p50": runs["tpot.p50"].astype(float) * 1000,
        "place_accuracy": [place_text(run.get("place_accuracy")) for run in rows],
    }
    shown = runs.assign(**own, **readable_options(runs, options))
    blank = [None] * len(shown)
    cells = {name: [_cell(value, c.template) for value in shown.get(name, blank)] for name, c in columns.items()}
    cells = {name: texts for name, texts in cells.items() if name not in RARE or set(texts) != {"-"}}
    if wide:
        return _markdown({columns[name].wide or columns[name].heading: texts for name, texts in cells.items()})
    cells["run"] = short_runs(cells["run"])
    cells = {name: texts if name in WHOLE else [_clipped(t) for t in texts] for name, texts in cells.items()}
    return _narrow(columns, cells)


def _narrow(columns: dict[str, Column], cells: dict[str, list[str]]) -> str:
    above, below = [], []
    for name in [
        name for name in cells if columns[name].shared and len(set(cells[name])) == 1 and len(cells[name]) > 1
    ]:
        (text, *_) = cells.pop(name)
        above += [f"{columns[name].heading} {text}"] if text not in ("-", "0") else []
    for name in [name for name, texts in cells.items() if columns[name].leaves and set(texts) == {"-"}]:
        del cells[name]
    kept = {name for name in cells if not columns[name].leaves}
    wanted = [name for name in cells if name not in {*kept, RECORDED_ONLY}]
    for name in sorted(wanted, key=lambda name: columns[name].leaves):
        if _width({n: texts for n, texts in cells.items() if n in kept | {name}}, columns) <= WIDTH:
            kept.add(name)
    text = _markdown({columns[name].heading: texts for name, texts in cells.items() if name in kept})
    below = [columns[name].heading for name in cells if name not in kept]
    if above:
        text = _wrapped(f"all runs: {', '.join(above)}") + "\n" + text
    if below:
        text += "\n" + _wrapped(f"experiments.report --wide also shows {', '.join(below)}")
    return text


def short_runs(names: list[str]) -> list[str]:
    """Run names for a table: the first digits of their hash where they have one, as many as tell them apart."""
    hashes = [match[1] if (match := re.search(r"-([0-9a-f]{12})$", name)) else name for name in names]
    short = [text[:8] if text != name else text for text, name in zip(hashes, names, strict=True)]
    return short if len(set(short)) == len(set(names)) else hashes


def sweep_table(path: Path, wide: bool = False) -> str:
    """The finished runs of a sweep, given by its file.

    Raises:
        UsageError: the file is not the record of a sweep.
    """
    runs = load_runs(path)
    return "no finished run" if runs.empty else with_notes(runs, wide)


def with_notes(runs: pd.DataFrame, wide: bool = False) -> str:
    """`runs_table`, below it a line for each thing that must be known to read it, the latencies of traffic, and the
    conclusion."""
    notes = [*notes_on(runs), *filter(None, [mixture(runs)])]
    lines = [runs_table(runs, wide), *(_wrapped(f"note: {line}") for line in notes)]
    if timed(runs).any():
        lines += ["", latency_table(runs[timed(runs)], wide)]
    if found := conclusions(runs):
        lines += ["", *map(_wrapped, found)]
    return "\n".join(lines)


TAILS = {"ttft": ("s", 1), "itl": ("ms", 1000), "tpot": ("ms", 1000), "e2e": ("s", 1)}
"""Times of a request that `latency_table` shows -> the unit, and how many of it are a second."""

LATENCY = {
    **{name: COLUMNS[name] for name in ("run", "model.name", "workload.name", "policy", "budget")},
    "rate.offered": Column("offered/s", "{:.3g}"),
    "rate.achieved": Column("achieved/s", "{:.3g}"),
    "slo_rate": Column("goodput/s", "{:.3g}"),
    "slo_share": Column("in time", "{:.1%}"),
    **{
        name: Column(f"{name.upper()} p50/90/99 {unit}", wide=f"{name.upper()} p50 / p90 / p99 ({unit})", leaves=leaves)
        for (name, (unit, _)), leaves in zip(TAILS.items(), (0, 4, 6, 5), strict=True)
    },
    "errors": COLUMNS["errors"],
}


def timed(runs: pd.DataFrame) -> pd.Series:
    """Of which rows of `load_runs()` requests arrived over time, not all at once."""
    return runs.reindex(columns=["rate.offered"]).astype(float).iloc[:, 0].notna()


def latency_table(runs: pd.DataFrame, wide: bool = False, compared: pd.DataFrame | None = None) -> str:
    """Rates and the tails of latency, p50 / p90 / p99, as a table like `runs_table`.

    Args:
        compared: what `compare()` made of the runs with limits on times: the goodput under them.
    """
    shown = runs.copy()
    for name, (_, unit) in TAILS.items():
        points = runs.reindex(columns=[f"{name}.p{p}" for p in PERCENTILES]).astype(float) * unit
        shown[name] = [None if row.isna().any() else " / ".join(map(_figures, row)) for _, row in points.iterrows()]
    columns = dict(LATENCY)
    for name in ("slo_rate", "slo_share"):
        if compared is None:
            del columns[name]
        else:
            shown[name] = compared[name]
    return runs_table(shown, wide, columns)


def _figures(value: float) -> str:
    """Three figures, and all before the point."""
    return f"{value:#.3g}".rstrip(".") if value < 100 else f"{value:.0f}"


def mixture(runs: pd.DataFrame) -> str | None:
    """In which code rows of `load_runs()` differ that look alike in a table, in a line; None where they don't.

    A record from before there were hashes of the code counts by its commit.
    """
    said = []
    commits = runs.reindex(columns=["provenance.code.commit"]).astype(str).iloc[:, 0]
    for part, owner in (("engine", "backend"), ("policy", "policy.name"), ("grader", "workload.grader")):
        hashes = runs.reindex(columns=[f"provenance.sources.{part}"]).astype(object).iloc[:, 0].fillna(commits)
        # A policy around another is of both.
        owners = runs.reindex(columns=[owner, *["policy.options.base"] * (part == "policy")]).astype(object).fillna("")
        for (name, *_), alike in hashes.groupby([owners[column] for column in owners]):
            if alike.nunique() > 1:
                said.append(f"{alike.nunique()} versions of the {part} {name}")
    if not said:
        return None
    return f"these rows were made by {', '.join(said)}: the code is a part of what differs between them"


def never_bound(run: pd.Series) -> bool:
    """Whether a row of `load_runs()` is a run that could evict and never did."""
    value = run.get("budget_never_bound")  # absent or NaN in records from before there was eviction
    return not _missing(value) and bool(value)


def _insert(columns: dict[str, Column], behind: str, more: dict[str, Column]) -> dict[str, Column]:
    found: dict[str, Column] = {}
    for name, column in columns.items():
        found[name] = column
        if name == behind:
            found |= more
    return found


def _of_option(option: str, names: dict[str, str]) -> Column:
    return Column(names[option], wide=option, leaves=OPTION.leaves)


def _width(cells: dict[str, list[str]], columns: dict[str, Column]) -> int:
    return 1 + sum(3 + max(3, len(columns[name].heading), *map(len, texts)) for name, texts in cells.items())


def _markdown(cells: dict[str, list[str]]) -> str:
    return markdown(list(cells), list(zip(*cells.values(), strict=True)))


def _policy(run: pd.Series) -> str:
    name, protection = run["policy.name"], run["policy.protection"]
    return name if name == "full" or protection == "none" else f"{name} + {protection}"


def place_text(accuracy: list[float] | None) -> str:
    """The accuracy at each place of a chain or conversation in percent: "49 45 45 45"."""
    return " ".join(f"{100 * share:.0f}" for share in accuracy) if isinstance(accuracy, list) else "-"


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _cell(value: object, template: str) -> str:
    return "-" if _missing(value) else template.format(value)


def _missing(value: object) -> bool:
    return value is None or value != value  # NaN
