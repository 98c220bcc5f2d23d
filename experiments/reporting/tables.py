"""The comparison of runs as a table: Markdown, LaTeX, CSV."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from experiments.config.options import (
    GROUPS,
    SHOWN,
    budget_texts,
    in_order,
    label,
    readable_options,
    short_names,
    varied_options,
)
from experiments.reporting.markdown import markdown
from experiments.reporting.runs_table import place_text

Cell = Callable[[pd.Series], str]


def _number(column: str, template: str) -> Cell:
    return lambda row: "-" if pd.isna(row[column]) else template.format(row[column])


def _bounded(column: str, scale: float, number: str) -> Cell:
    """A figure and its interval, if there is one: a single problem gives none."""

    def cell(row: pd.Series) -> str:
        figures = [row[name] for name in (column, f"{column}.low", f"{column}.high") if pd.notna(row[name])]
        value, *bounds = (number.format(scale * figure) for figure in figures) if figures else "-"
        return f"{value} [{', '.join(bounds)}]" if bounds else value

    return cell


def _difference(baseline: str) -> Cell:
    def cell(row: pd.Series) -> str:
        if pd.isna(row[f"{baseline}.difference"]):
            return "-"
        figures = (100 * row[f"{baseline}.{name}"] for name in ("difference", "low", "high"))
        return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*figures)

    return cell


def _text(column: str) -> Cell:
    return lambda row: "-" if row[column] is None or pd.isna(row[column]) else str(row[column])


AS_MANY_BYTES = "less random + prompt of as many bytes"
BY_PLACE, RECALL = "by place (%)", "recall (%)"
FIDELITY = ("KL (nats/token) [95 %]", "agreement (%) [95 %]", "loss on solutions (nats/token) [95 %]")
WHERE_ANY = (BY_PLACE, RECALL, *FIDELITY, AS_MANY_BYTES)
"""Columns that are left out where no run has such a figure: of chains, conversations, fidelity, such a control."""

COLUMNS: dict[str, Cell] = {
    "workload": _text("workload.name"),
    "policy": label,
    "budget": _text("budget.text"),
    "accuracy (%) [95 %]": _bounded("accuracy", 100, "{:.1f}"),
    BY_PLACE: lambda row: place_text(row["place_accuracy"]),
    RECALL: lambda row: "-" if pd.isna(row["recall_accuracy"]) else f"{100 * row['recall_accuracy']:.1f}",
    FIDELITY[0]: _bounded("divergence", 1, "{:.4f}"),
    FIDELITY[1]: _bounded("agreement", 100, "{:.1f}"),
    FIDELITY[2]: _bounded("worked_loss", 1, "{:+.4f}"),
    "tokens/s": _number("output_tokens_per_second", "{:,.0f}"),
    "KV MiB": lambda row: "-" if pd.isna(row["kv_bytes.mean"]) else f"{row['kv_bytes.mean'] / 2**20:,.2f}",
    "less full KV": _difference("full"),
    "verdict": _text("full.verdict"),
    "less random + prompt": _difference("random"),
    AS_MANY_BYTES: _difference("bytes"),
    "problems": _number("problems", "{:,.0f}"),
    "right answers/GPU-hour": _number("correct_per_gpu_hour", "{:,.0f}"),
    "mean output": _number("output_length.mean", "{:,.0f}"),
    "length / full KV": _number("output_length.inflation", "{:.2f}"),
    "cut (%)": lambda row: "-" if pd.isna(row["cap_hit_share"]) else f"{100 * row['cap_hit_share']:.1f}",
    "loops (%)": lambda row: "-" if pd.isna(row["loop_rate"]) else f"{100 * row['loop_rate']:.1f}",
    "bound (%)": lambda row: "-" if pd.isna(row["budget_bound_share"]) else f"{100 * row['budget_bound_share']:.0f}",
}
"""Heading -> the cell of a row of `compare()`."""


def comparison_table(compared: pd.DataFrame) -> pd.DataFrame:
    """The rows of `compare()` as text, full KV first in each workload, then by policy and budget.

    Budgets are those that held. Each option in which the runs differ has a column.
    """
    options = [name for name in compared if name.partition(".")[0] in GROUPS and name not in SHOWN]
    shown = readable_options(compared, options)
    keyed = compared.assign(**{"budget.text": budget_texts(compared)})
    order = in_order(keyed)
    rows = [[cell(row) for cell in COLUMNS.values()] for _, row in order.iterrows()]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table = table.drop(columns=[name for name in WHERE_ANY if (table[name] == "-").all()])
    place = list(COLUMNS).index("budget") + 1
    for option in reversed(options):
        table.insert(place, option, shown.loc[order.index, option].tolist())
    if compared["device"].nunique() > 1:
        table.insert(place + len(options), "device", order["device"].tolist())
    if compared["model.name"].nunique() > 1:
        table.insert(0, "model", order["model.name"].tolist())
    return table


def by_load(compared: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """`comparison_table` cut by model and workload, each with a title, in short names.

    Each part has only the columns that say something there: a load without accuracy has none of accuracy, and the
    options in which its own rows differ.
    """
    several = compared["model.name"].nunique() > 1
    parts = []
    for (workload, model), part in compared.groupby(["workload.name", "model.name"], sort=True):
        table = comparison_table(part)
        options = [name for name in table if (name.partition(".")[0] in GROUPS and "." in name) or name in GROUPS]
        options = [name for name in options if name not in COLUMNS]
        blank = [name for name in table if (table[name] == "-").all() and name not in ("policy", "budget")]
        same = [name for name in options if table[name].nunique() == 1]
        table = table.drop(columns=[*{*blank, *same, *({"workload", "model"} & set(table))}])
        names = short_names(name for name in options if name in table)
        parts.append((f"{workload} ({model})" if several else str(workload), table.rename(columns=names)))
    return parts


def by_option(
    runs: pd.DataFrame, compared: pd.DataFrame, option: str, heading: str = "accuracy (%) [95 %]"
) -> pd.DataFrame:
    """What one option changes: a column for each of its values, a row for each setting of all others that vary.

    Settings that were run with a single value of the option are left out: they can't tell what it changes.

    Args:
        runs, compared: rows of `load_runs()`, and what `compare()` made of them.
        heading: of `COLUMNS`, what the cells show.
    """
    others = ["model.name", "workload.name", *(name for name in varied_options(runs) if name != option)]
    cells = readable_options(runs, [*others, option]).assign(_cell=compared.apply(COLUMNS[heading], axis=1))
    several = cells[cells.groupby(others)[option].transform("nunique") > 1]
    values = sorted(several[option].unique(), key=_by_number)
    settings = several[others].drop_duplicates()
    settings = settings.sort_values(others, key=lambda column: column.map(_by_number), ignore_index=True)
    for value in values:
        alike = several[several[option] == value].groupby(others)["_cell"].agg(" / ".join)
        settings = settings.join(alike.rename(f"{option}={value}"), on=others)
    told_apart = [name for name in others if settings[name].nunique() > 1]
    return settings[[*told_apart, *(f"{option}={value}" for value in values)]].fillna("")


def _by_number(text: str) -> tuple[int, float, str]:
    return (0, float(text), "") if text.isdigit() else (1, 0.0, text)


def to_markdown(table: pd.DataFrame) -> str:
    return markdown(list(table.columns), table.astype(str).values.tolist())


def to_latex(table: pd.DataFrame) -> str:
    """A `tabular` with the rules of booktabs; numbers stand to the right."""
    align = "".join("l" if name in ("model", "workload", "policy", "verdict") else "r" for name in table.columns)
    rows = [[_escaped(cell) for cell in row] for row in (list(table.columns), *table.astype(str).values.tolist())]
    lines = [" & ".join(row) + r" \\" for row in rows]
    body = [r"\begin{tabular}{" + align + "}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"]) + "\n"


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
_SPECIAL |= {">": r"\textgreater{}"} | {character: "\\" + character for character in "&%$#_{}"}


def _escaped(text: str) -> str:
    return re.sub(r"[\\~^<>&%$#_{}]", lambda match: _SPECIAL[match[0]], text)


def write_tables(
    table: pd.DataFrame, folder: Path, name: str = "comparison", numbers: pd.DataFrame | None = None
) -> list[Path]:
    """Write `name`.md, .tex and .csv into `folder`, which is made where it is missing. Returns their paths.

    Args:
        numbers: what the CSV file holds instead of the table's texts, such as the rows of `compare()`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}{suffix}" for suffix in (".md", ".tex", ".csv")]
    plain = (table if numbers is None else numbers).to_csv(index=False)
    for path, text in zip(paths, (to_markdown(table) + "\n", to_latex(table), plain), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths
