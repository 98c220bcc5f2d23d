"""Which policy wins where, by how much and at which bytes: what `ranking()` found as tables."""

from __future__ import annotations

import pandas as pd

from experiments.analysis.baselines import FIELD
from experiments.analysis.ranking import ACCURACY
from experiments.config.options import label, readable_options, told_apart

HEADINGS = {
    ACCURACY: "accuracy (%) [95 %]",
    "divergence": "KL (nats/token) [95 %]",
}
RIVALS = {
    "full": "less full KV",
    "random": "less random",
    "bytes": "less random of as many bytes",
    "uniform": "less equal budgets",
    "best": "less the best",
}
UNTOLD = "not told apart from it"


def winners(runs: pd.DataFrame, compared: pd.DataFrame, ranked: pd.DataFrame) -> pd.DataFrame:
    """A row for each field as text: its best, and the others that no interval of the difference tells apart from it.

    Args:
        runs, compared, ranked: rows of `load_runs()`, and what `compare` and `ranking` made of them.
    """
    rows = []
    for title, field, cells in _fields(runs, compared, ranked):
        told = (field["best.low"] > 0) | (field["best.high"] < 0) | (field["place"] == 1)
        names = cells["policy"][~told.to_numpy()]
        rows.append({"field": title} | cells.iloc[0].to_dict() | {UNTOLD: ", ".join(names) or "-"})
    return _said(pd.DataFrame(rows)).rename(columns={"policy": "best"})


def standings(runs: pd.DataFrame, compared: pd.DataFrame, ranked: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The runs of each field as text, the best first, under the field's title. Arguments as for `winners`."""
    return [(title, _said(cells)) for title, _, cells in _fields(runs, compared, ranked)]


def _fields(
    runs: pd.DataFrame, compared: pd.DataFrame, ranked: pd.DataFrame
) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """The title of each field, its rows of `ranked`, and the same as text."""
    runs = runs.loc[ranked.index]
    names, others = _names(runs), _where_they_ran(runs)
    found = []
    for _, field in ranked.groupby("field"):
        run, budget = runs.loc[field.index[0]], compared["budget"][field.index[0]]
        told = [f"{run['workload.name']}, {run['model.name']}", f"{budget:,.0f} entries"]
        told += [] if run["policy.protection"] == "none" else [f"{run['policy.protection']} protected"]
        cells = [_cells(names[i], row, compared.loc[i]) for i, row in field.iterrows()]
        found.append((", ".join([*told, *others[field.index[0]]]), field, pd.DataFrame(cells)))
    return found


def _names(runs: pd.DataFrame) -> dict[object, str]:
    """Label and own options of each run: "critical (base=h2o)"; what it protects is the field's."""
    options = [name for name in told_apart(runs) if name.startswith("policy.options.")]
    shown, found = readable_options(runs, options), {}
    for i, run in runs.iterrows():
        own = [f"{name.rpartition('.')[2]}={shown[name][i]}" for name in options if shown[name][i] != "-"]
        found[i] = label(run.where(run.index != "policy.protection", "none")) + f" ({', '.join(own)})" * bool(own)
    return found


def _where_they_ran(runs: pd.DataFrame) -> dict[object, list[str]]:
    """What else tells fields apart: "enable_prefix_caching=False"."""
    options = [name for name in told_apart(runs) if name in (*FIELD, "limit", "seed")]
    shown = readable_options(runs, options)
    given = {i: [(name.rpartition(".")[2], shown[name][i]) for name in options] for i in runs.index}
    return {i: [f"{name}={value}" for name, value in pairs if value != "-"] for i, pairs in given.items()}


def _cells(name: str, row: pd.Series, compared: pd.Series) -> dict[str, str]:
    graded = row["figure"] == ACCURACY
    scale, plain, signed = (100, "{:.1f}", "{:+.1f}") if graded else (1, "{:.4f}", "{:+.4f}")

    def bounded(figures: list[float], number: str) -> str:
        if not figures or pd.isna(figures[0]):
            return "-"
        value, *bounds = (number.format(scale * figure) for figure in figures if pd.notna(figure))
        return f"{value} [{', '.join(bounds)}]" if bounds else value

    found = dict.fromkeys(HEADINGS.values(), "-")
    found[HEADINGS[row["figure"]]] = bounded([row[f"value{end}"] for end in ("", ".low", ".high")], plain)
    for rival, heading in RIVALS.items():
        source = compared if rival == "full" else row
        found[heading] = bounded([source[f"{rival}.{end}"] for end in ("difference", "low", "high")], signed)
    held, share = compared["kv_bytes.mean"], row["bytes_of_full"]
    found["KV MiB"] = "-" if pd.isna(held) else f"{held / 2**20:,.2f}"
    found["of full KV (%)"] = "-" if pd.isna(share) else f"{100 * share:.0f}"
    return {"policy": name} | found


def _said(table: pd.DataFrame) -> pd.DataFrame:
    """Without the columns that say nothing."""
    return table.drop(columns=[name for name in table if (table[name] == "-").all()])
