"""Published figures beside ours, each marked as what it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import ttest_ind

from experiments.config.options import budget_texts, label, readable_options, told_apart
from experiments.config.yaml_files import read_yaml
from experiments.errors import UsageError
from experiments.paths import ROOT

if TYPE_CHECKING:
    import pandas as pd

FOLDER = ROOT / "results" / "published"
KEYS = {"title", "source", "setting", "columns", "rows"}
ROW_KEYS = {"name", "ours", "figures"}


def read_published(name: str) -> dict[str, Any]:
    """A table of published figures, by its name in `results/published/` or as a path that ends in .yaml.

    Raises:
        UsageError: there is none, or it lacks a key or a figure.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(f"{name}: no such table; there are {', '.join(sorted(p.stem for p in FOLDER.glob('*.yaml')))}")
    table = read_yaml(path)
    if not isinstance(table, dict) or set(table) != KEYS:
        raise UsageError(f"{path.name}: must hold {', '.join(sorted(KEYS))}")
    for row in table["rows"]:
        if set(row) != ROW_KEYS or len(row["figures"]) != len(table["columns"]):
            raise UsageError(
                f"{path.name}: {row.get('name')}: must hold name, ours, and {len(table['columns'])} figures"
            )
    return table


def beside(runs: pd.DataFrame, compared: pd.DataFrame, published: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each published one: its figures, and the runs of ours that are meant by it.

    `ours` of a row names values of options, and of `label`: "random + prompt" is one however the policy was named.

    Args:
        runs, compared: rows of `load_runs()`, and what `compare` makes of them.
        published: of `read_published`.

    Returns:
        Text: name, "published: ..." for each of its columns, and `OURS`: accuracy, tokens/s, those over full KV's of
        the same model and load (with an interval where both are steady states), tokens a step (the requests at work at
        once), and what the run is. What is not there is "-". Where several runs of ours are meant, each has a
        row of its own.
    """
    import pandas as pd

    named, budgets = runs.assign(label=runs.apply(label, axis=1)), budget_texts(compared, full="full KV")
    timed = runs.assign(output_tokens_per_second=compared["output_tokens_per_second"])
    fulls = {record["run"]: record for _, record in timed.iterrows()} if "run" in runs else {}
    options = told_apart(runs)
    settings = readable_options(runs, options)
    rows = []
    for row in published["rows"]:
        figures = {
            f"published: {column}": "-" if figure is None else f"{figure:,}"
            for column, figure in zip(published["columns"], row["figures"], strict=True)
        }
        meant = pd.Series(bool(row["ours"]), index=runs.index)
        for column, value in row["ours"].items():
            meant &= named[column] == value if column in named else False
        matching = compared[meant.to_numpy()]
        if matching.empty:
            rows.append({"row": row["name"]} | figures | dict.fromkeys(OURS, "-"))
        for index, run in matching.iterrows():
            setting = [f"{option} {value}" for option, value in settings.loc[index].items() if value != "-"]
            what = ", ".join([run["model.name"], run["workload.name"], budgets[index], *setting])
            full = fulls.get(run.get("full.run"))
            rows.append({"row": row["name"]} | figures | _ours(run, full, timed.loc[index], what))
    return pd.DataFrame(rows)


OURS = (
    "ours: accuracy (%) [95 %]",
    "ours: tokens/s",
    "ours: of full KV (%)",
    "ours: tokens a step",
    "ours: model, workload, budget",
)


def _ours(run: pd.Series, full: pd.Series | None, record: pd.Series, what: str) -> dict[str, str]:
    import pandas as pd

    accuracy = "-"
    if pd.notna(run["accuracy"]):
        accuracy = "{:.1f} [{:.1f}, {:.1f}]".format(
            *(100 * run[name] for name in ("accuracy", "accuracy.low", "accuracy.high"))
        )
    speed = run["output_tokens_per_second"]
    of_full = "-" if full is None else _share(speed / full["output_tokens_per_second"], record, full)
    steps = record.get("steps")
    batch = f"{record['output_tokens'] / steps:,.1f}" if steps and pd.notna(steps) else "-"
    return dict(zip(OURS, (accuracy, f"{speed:,.0f}", of_full, batch, what), strict=True))


def _share(ratio: float, record: pd.Series, full: pd.Series) -> str:
    """A ratio in percent; of two steady states with its 95 % interval over the parts of their windows."""
    parts = [record.get("window_rates"), full.get("window_rates")]
    if record["run"] == full["run"] or not all(isinstance(rates, list) and min(rates) > 0 for rates in parts):
        return f"{100 * ratio:.0f}"
    interval = ttest_ind(*map(np.log, parts), equal_var=False).confidence_interval()
    low, high = 100 * np.exp([interval.low, interval.high])
    return f"{100 * ratio:.0f} [{low:.0f}, {high:.0f}]"
