"""What `frontier()` found as a table: speed and accuracy beside full KV's in the same pool."""

from __future__ import annotations

import pandas as pd

from experiments.analysis.baselines import POOL
from experiments.analysis.frontier import KEEP
from experiments.config.options import (
    GROUPS,
    SHOWN,
    budget_texts,
    in_order,
    label,
    readable_options,
    short_names,
)
from experiments.reporting.tables import RECALL


def frontier_table(rows: pd.DataFrame, keep: float = KEEP) -> pd.DataFrame:
    """A row for each of `frontier(runs, keep=keep)` as text, pool by pool, full KV first, then by policy and budget."""
    keyed = in_order(rows.assign(**{"budget.text": budget_texts(rows)}))
    keyed = keyed.sort_values("pool.full", key=lambda full: full.map(_place(keyed)), kind="stable")
    options = [name for name in keyed if name.partition(".")[0] in GROUPS and name not in (*SHOWN, *POOL)]
    shown = readable_options(keyed, options)
    table = pd.DataFrame(
        {
            "workload": keyed["workload.name"],
            "pool": keyed["pool"],
            "policy": keyed.apply(label, axis=1),
            "budget": keyed["budget.text"],
        }
    )
    for option, name in short_names(options).items():
        if shown[option].nunique() > 1:
            table[name] = shown[option]
    table["tokens/s"] = keyed["output_tokens_per_second"].map("{:,.0f}".format)
    table["tokens/s x"] = keyed["speed_up"].map("{:.2f}".format)
    table["answers/s x"] = keyed["answers_speed_up"].map("{:.2f}".format)
    table["accuracy (%) [95 %]"] = _bounded(keyed, "accuracy")
    table["of full KV (%) [95 %]"] = _bounded(keyed, "share").where(keyed["claim"].notna(), "100")
    table[f"keeps {100 * keep:g} %"] = keyed["claim"].fillna("-")
    if keyed["recall_accuracy"].notna().any():  # which the claim leaves out
        recalls = 100 * keyed["recall_accuracy"].astype(float)
        table[RECALL] = recalls.map("{:.1f}".format).where(recalls.notna(), "-")
    return table.reset_index(drop=True)


def _place(rows: pd.DataFrame) -> dict[str, int]:
    """The place of each pool: by workload and model, then from the least throughput of full KV."""
    full = rows[rows["run"] == rows["pool.full"]]
    order = full.sort_values(["workload.name", "model.name", "output_tokens_per_second"])["run"]
    return {run: place for place, run in enumerate(order)}


def _bounded(rows: pd.DataFrame, column: str) -> pd.Series:
    figures = 100 * rows[[column, f"{column}.low", f"{column}.high"]].astype(float)
    return pd.Series(["{:.1f} [{:.1f}, {:.1f}]".format(*row) for row in figures.to_numpy()], rows.index, dtype=object)
