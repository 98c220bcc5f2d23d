"""A benchmark's rows as a table in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from experiments.errors import UsageError

Column = tuple[str, str, Callable[[Any], str]]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


KERNELS: list[Column] = [
    ("kernel", "kernel", str),
    ("shape", "shape", str),
    ("bytes", "MB", lambda value: f"{value / 1e6:,.1f}"),
    ("flops", "GFLOP", lambda value: f"{value / 1e9:,.1f}"),
    ("ms", "ms", "{:.3f}".format),
    ("p10_ms", "p10", "{:.3f}".format),
    ("p90_ms", "p90", "{:.3f}".format),
    ("of_copy", "of copy", _percent),
    ("of_roofline", "of roofline", _percent),
    ("error", "error", "{:.1e}".format),
    ("refused", "refused", str),
]
ENGINES: list[Column] = [
    ("load", "load", str),
    ("arm", "arm", str),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
    ("lowest", "lowest", "{:,.0f}".format),
    ("highest", "highest", "{:,.0f}".format),
    ("floor_tokens_per_second", "floor", "{:,.0f}".format),
    ("of_floor", "of floor", _percent),
    ("step_ms", "step ms p50 / p90 / p99", lambda value: " / ".join(f"{time:.2f}" for time in value.values())),
    ("host_ms", "host ms", "{:.2f}".format),
    ("gpu_idle", "GPU idle", _percent),
    ("mean_batch", "batch", "{:.0f}".format),
    ("step_bytes", "GB a step", lambda value: f"{value / 1e9:.1f}"),
    ("compressions", "compressions", "{:.0f}".format),
    ("pauses", "pauses", "{:.0f}".format),
    ("preemptions", "preemptions", "{:.0f}".format),
    ("startup_seconds", "start s", "{:.1f}".format),
    ("memory_bytes", "GB", lambda value: f"{value / 1e9:.1f}"),
    ("refused", "refused", str),
]


def markdown(rows: pd.DataFrame) -> str:
    """The rows of `load_rows`; columns that no row fills are left out."""
    columns = KERNELS if "kernel" in rows else ENGINES
    columns = [column for column in columns if column[0] in rows and rows[column[0]].notna().any()]
    lines = []
    for _, row in rows.iterrows():
        values = [(row[name], show) for name, _, show in columns]
        lines.append([show(v) if isinstance(v, dict) or pd.notna(v) else "" for v, show in values])
    return _table([title for _, title, _ in columns], lines)


def against(rows: pd.DataFrame, arm: str) -> str:
    """Tokens a second of all arms over those of `arm` under the same load, of rows of `load_rows`.

    A ratio is one of geometric means over the repeats, with its 95 % interval by Welch's t-test of their logarithms. It
    takes repeats for independent, and says nothing of what differs from one start of an engine to the next.

    Raises:
        UsageError: no load has timed that arm.
    """
    timed = rows[rows["tokens_per_second"].notna()] if "arm" in rows else rows[:0]
    base = timed[timed["arm"] == arm].set_index("load")["repeats"] if len(timed) else {}
    if not len(base):
        known = ", ".join(dict.fromkeys(timed["arm"])) if len(timed) else "none: these are no engines"
        raise UsageError(f"--against {arm}: no such arm was timed; there are {known}")
    lines = []
    for _, row in timed.iterrows():
        if row["load"] in base:
            mine, other = np.log(row["repeats"]), np.log(base[row["load"]])
            ratio = f"{np.exp(mine.mean() - other.mean()):.3f}"
            if row["arm"] != arm and min(len(mine), len(other)) > 1:
                interval = ttest_ind(mine, other, equal_var=False).confidence_interval()
                ratio += f" [{np.exp(interval.low):.3f}, {np.exp(interval.high):.3f}]"
            lines.append([row["load"], row["arm"], f"{np.exp(mine.mean()):,.0f}", str(len(mine)), ratio])
    return _table(["load", "arm", "mean tokens/s", "repeats", f"of {arm}"], lines)


def _table(titles: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines))
