"""What runs say beside full KV, in one plain sentence for each workload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.config.options import budget_texts, label, readable_options, short_names

if TYPE_CHECKING:
    import pandas as pd

DECIDE_SPEED = ("engine.", "scenario.", "hardware.", "sampling.")
"""Where a run and its baseline differ in these options, their tokens/s are of different loads."""
RECORDED_ONLY = "engine.trace_positions"
"""What decides no figure."""


def conclusions(runs: pd.DataFrame, compared: pd.DataFrame | None = None) -> list[str]:
    """A sentence for each model and workload that full KV and an evicting policy both answered.

    It names the run that kept the most of full KV's right answers, of equal ones the one with the least memory. Where
    no workload is graded, it names the run that gained the most tokens/s under the same load; `scenario=fidelity` is no
    load.

    Memory is what a request's cache held at most, the mean over requests, as in the ranking.

    The interval is that of the run's accuracy, over the accuracy of full KV taken as it is.

    Args:
        runs: rows of `load_runs()`.
        compared: what `compare(runs)` gave, where it is at hand.

    Returns:
        Nothing where no run has a baseline.
    """
    from experiments.analysis import compare

    if runs.empty or not (runs["policy.name"] == "full").any() or not (runs["policy.name"] != "full").any():
        return []
    table = (compare(runs) if compared is None else compared).reset_index(drop=True)
    full = table.drop_duplicates("run").set_index("run")
    beside = table[table["full.run"].notna()]
    if beside.empty:
        return []
    base = full.loc[beside["full.run"]].set_index(beside.index)
    beside = beside.assign(
        _kept=(beside["accuracy"] / base["accuracy"]).where(base["accuracy"] > 0),
        _memory=beside["kv_bytes.mean"].astype(float) / base["kv_bytes.mean"].astype(float),
        _speed=beside["output_tokens_per_second"].astype(float) / base["output_tokens_per_second"].astype(float),
        _full=base["accuracy"],
    )
    graded = beside[beside["_kept"].notna() & beside["full.difference"].notna()]
    if len(graded):
        best = [_best(part, "_kept") for _, part in graded.groupby(["model.name", "workload.name"])]
        lines = [(run, _answers(run)) for run in best]
    else:
        fed = runs.loc[runs.reindex(columns=["scenario.kind"]).iloc[:, 0] == "fidelity", "run"]
        same = beside[beside["accuracy"].isna() & ~beside["run"].isin(fed)]
        same = same[_same_load(same, base.loc[same.index]) & same["_speed"].notna()]
        best = [_best(part, "_speed") for _, part in same.groupby(["model.name", "workload.name"])]
        lines = [(run, f"{run['_speed']:.2f} x full KV's tokens/s{_memory(run)}{_load(table, run)}") for run in best]
    told = [name for name in ("model.name", "workload.name") if len({run[name] for run in best}) > 1]
    return ["".join(f"{run[name]}: " for name in told) + f"{_named(run)}: {text}" for run, text in lines]


def _best(part: pd.DataFrame, figure: str) -> pd.Series:
    return part.sort_values([figure, "_memory"], ascending=[False, True], kind="stable").iloc[0]


def _named(run: pd.Series) -> str:
    budget = budget_texts(run.to_frame().T, full="").iloc[0]
    name = label(run) + (" (simulated)" if str(run.get("device")).endswith("(simulated)") else "")
    return f"{name} at {budget} entries" if budget else name


def _answers(run: pd.Series) -> str:
    low, high = (100 * run[f"accuracy.{end}"] / run["_full"] for end in ("low", "high"))
    return f"{100 * run['_kept']:.0f} % of full KV's answers [{low:.0f}, {high:.0f}]{_memory(run)}"


def _memory(run: pd.Series) -> str:
    return "" if run["_memory"] != run["_memory"] else f" with {100 * run['_memory']:.0f} % of its memory"


def _deciding(table: pd.DataFrame) -> list[str]:
    return [name for name in table if name.startswith(DECIDE_SPEED) and name != RECORDED_ONLY]


def _same_load(beside: pd.DataFrame, base: pd.DataFrame) -> pd.Series:
    options = _deciding(beside)
    return (readable_options(beside, options) == readable_options(base, options)).all(axis=1)


def _load(table: pd.DataFrame, run: pd.Series) -> str:
    """The load among the others, where there are several."""
    mine = table[table["workload.name"] == run["workload.name"]]
    texts = readable_options(mine, _deciding(mine))
    names, found = short_names(texts.columns), readable_options(run.to_frame().T, list(texts.columns)).iloc[0]
    said = [f"{names[name]} {found[name]}" for name in texts if texts[name].nunique() > 1]
    return f" ({', '.join(said)})" if said else ""
