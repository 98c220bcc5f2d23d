"""What tells runs apart: the options in which they differ, the budget that each held, the problems that each asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import compress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

GROUPS = ("model", "engine", "policy", "workload", "sampling", "scenario", "hardware", "backend", "limit", "seed")
"""Groups of a run's options, and its options without a group; `tracking` decides nothing."""

SHOWN = ("model.name", "workload.name", "policy.name", "policy.protection", "policy.budget_tokens")
"""Options that have a place of their own in every table."""

REPEATED = ("workload.max_tokens", "workload.samples")
"""Defaults of options of `sampling`, which are recorded themselves."""

BUDGET, INTERVAL = "policy.budget_tokens", "policy.interval"

NAMES = {
    BUDGET: "budget",
    "model.name": "model",
    "workload.name": "workload",
    "policy.name": "policy",
}
"""What options are called where there is little room; others by their last part, as they are typed."""


def short_names(options: Iterable[str]) -> dict[str, str]:
    """Option -> a short name of it, with as many of its last parts as tell it from the other options here."""
    options, names = list(dict.fromkeys(options)), {}
    for option in options:
        parts = option.split(".")
        for count in range(1, len(parts) + 1):
            names[option] = ".".join(parts[-count:])
            if sum(other == names[option] or other.endswith(f".{names[option]}") for other in options) == 1:
                break
    return names | {option: NAMES[option] for option in options if option in NAMES}


def in_order(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `load_runs()` or `compare()` by workload and model, full KV first, then by policy, budget and what
    else differs."""
    if runs.empty:
        return runs
    options = told_apart(runs)
    texts = _texts(runs, options)
    keys = [
        (run["workload.name"], run["model.name"], run["policy.name"] != "full", label(run))
        for run in runs.filter(items=NAMING).to_dict("records")
    ]
    budgets = held_budgets(runs).fillna(0).tolist()
    numbers = [[_by_number(texts[option][i]) for option in options] for i in range(len(runs))]
    places = sorted(range(len(runs)), key=lambda i: (*keys[i], budgets[i], *numbers[i]))
    return runs.iloc[places]


def _by_number(text: str) -> tuple[int, float, str]:
    return (0, float(text), "") if text.isdigit() else (1, 0.0, text)


NAMING = (
    *("workload.name", "model.name", "policy.name", "policy.protection", "policy.allocation"),
    "provenance.calibration",
)
"""What a run is called by."""


def label(run: Mapping[str, Any] | pd.Series) -> str:
    """`zipage`, `zipage + prompt`, `full KV`; `q_filters@1a2b3c4d`, by the sha256 of the calibration file; `snapkv,
    adaptive`, by the allocation where budgets are unequal."""
    name, protection = run["policy.name"], run["policy.protection"]
    if name == "full":
        return "full KV"
    name, protection = ("random", "prompt") if name == "random_attention" else (name, protection)
    calibration = run.get("provenance.calibration")
    name = f"{name}@{calibration[:8]}" if isinstance(calibration, str) else name
    allocation = run.get("policy.allocation")
    name = f"{name}, {allocation}" if isinstance(allocation, str) and allocation != "uniform" else name
    return name if protection == "none" else f"{name} + {protection}"


def simulated(runs: pd.DataFrame) -> pd.Series:
    """Whether each row of `load_runs()` is of an engine that was simulated."""
    return runs.reindex(columns=["scenario.kind"]).iloc[:, 0] == "simulate"


def held_budgets(runs: pd.DataFrame) -> pd.Series:
    """Entries per layer and KV head that a compression leaves: the budget asked for, in whole blocks.

    NaN under full KV. A request's own policy and budget (`sampling`) stand before the run's.

    Args:
        runs: rows of `load_runs()`, or of `compare()`, which holds these budgets already.
    """
    if "budget" in runs:
        return runs["budget"].astype(float)
    return in_whole_blocks(runs, asked_budgets(runs))


def in_whole_blocks(runs: pd.DataFrame, entries: pd.Series) -> pd.Series:
    """Numbers of entries, rounded up to whole blocks of each run of `load_runs()`."""
    size = _numbers(runs, "engine.block_size").fillna(1)
    return -(-entries // size) * size


def held_intervals(runs: pd.DataFrame) -> pd.Series:
    """Entries between two compressions of a request, for rows of `load_runs()`: a block where none was asked for."""
    return in_whole_blocks(runs, asked_intervals(runs).fillna(1))


def asked_intervals(runs: pd.DataFrame) -> pd.Series:
    """The intervals as they were asked for; NaN under full KV, and where none was."""
    return _numbers(runs, INTERVAL).where(_policies(runs) != "full")


def asked_budgets(runs: pd.DataFrame) -> pd.Series:
    """The budgets as they were asked for, NaN under full KV."""
    return _numbers(runs, "sampling.budget_tokens", BUDGET).where(_policies(runs) != "full")


def _policies(runs: pd.DataFrame) -> pd.Series:
    return first_given(runs, "sampling.policy", "policy.name", dtype=object)


def _numbers(runs: pd.DataFrame, *options: str) -> pd.Series:
    return first_given(runs, *options, dtype=float)


def first_given(runs: pd.DataFrame, *options: str, dtype: type) -> pd.Series:
    """The first of these options that each run has; NaN where it has none."""
    import pandas as pd

    found = None
    for option in options:
        if option in runs:
            values = runs[option].astype(dtype)
            found = values.rename(options[0]) if found is None else found.where(found.notna(), values)
    return pd.Series(float("nan"), runs.index, dtype, options[0]) if found is None else found


def budget_texts(runs: pd.DataFrame, full: str = "-") -> pd.Series:
    """256, or "256 (for 100)" where whole blocks made it more than was asked for; `full` under full KV."""

    def text(held: float, asked: float) -> str:
        if held != held:  # NaN
            return full
        return f"{held:,.0f}" + (f" (for {asked:,.0f})" if asked == asked != held else "")

    import pandas as pd

    pairs = zip(held_budgets(runs), asked_budgets(runs), strict=True)
    return pd.Series([text(*pair) for pair in pairs], index=runs.index, dtype=object)


def readable_options(runs: pd.DataFrame, options: list[str]) -> pd.DataFrame:
    """The options as text, budgets as they held. A record from before there was an option has its default."""
    import pandas as pd

    return pd.DataFrame(_texts(runs, options), index=runs.index, columns=options, dtype=object)


def _texts(runs: pd.DataFrame, options: Iterable[str]) -> dict[str, list[str]]:
    texts = {}
    for name in options:
        values = held_budgets(runs) if name == BUDGET else runs[name]
        default = readable(_defaults().get(name))
        texts[name] = [default if text == "-" else text for text in map(readable, values.tolist())]
    return texts


def readable(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "-" if value is None or value != value else str(value)


@cache
def _defaults() -> dict[str, Any]:
    from experiments.config.schema import Experiment, to_dict
    from experiments.records import flatten

    return {name: value for name, value in flatten(to_dict(Experiment())).items() if name not in SHOWN}


def varied_options(runs: pd.DataFrame) -> list[str]:
    """The options that differ among these rows of `load_runs()`, within a model and workload.

    What only evicting policies read is compared among them, and a policy's own options among the runs of that policy.
    """
    if len(runs) < 2:
        return []
    options = [name for name in runs if name.partition(".")[0] in GROUPS and name not in REPEATED]
    texts = _texts(runs, options)
    options = [name for name in options if len(set(texts[name])) > 1]
    evicting = [policy != "full" for policy in texts["policy.name"]]

    def differs(names: list[str], among: list[bool], *more: str) -> list[str]:
        keys = [*zip(*(texts[key] for key in ("model.name", "workload.name", *more)), strict=True)]
        groups = len(set(compress(keys, among)))
        return [name for name in names if len(set(compress(zip(keys, texts[name], strict=True), among))) > groups]

    own = [name for name in options if name.startswith("policy.options.")]
    eviction = [name for name in options if name.startswith("policy.") and name not in (*own, *SHOWN)]
    others = [name for name in options if name not in (*own, *eviction)]
    found = differs(others, [True] * len(runs)) + differs(eviction, evicting) + differs(own, evicting, "policy.name")
    return [name for name in options if name in found]


def told_apart(runs: pd.DataFrame) -> list[str]:
    """The varied options that have no place of their own in a table."""
    return [name for name in varied_options(runs) if name not in SHOWN]


def asks(option: str) -> bool:
    """Whether an option decides which problems are asked, or how."""
    return option == "limit" or (option.startswith("workload.") and option != "workload.allow_code_execution")
