"""How many times as fast: engines under a load against one of them, with intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from experiments.errors import UsageError


def against(rows: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Tokens a second of all arms over those of `arm` under the same load, of rows of `load_rows`.

    A ratio is one of geometric means over the repeats, with its 95 % interval by Welch's t-test of their logarithms. It
    takes repeats to be independent, and says nothing about what differs from one start of an engine to the next.

    Returns:
        Text: load, arm, mean tokens/s, repeats, and the ratio, with its interval where both have repeats.

    Raises:
        UsageError: no load has timed that arm.
    """
    if "arm" not in rows:
        raise UsageError(f"--against {arm}: the record has no engines")
    timed = rows[rows["tokens_per_second"].notna()]
    base = timed[timed["arm"] == arm].set_index("load")["repeats"]
    if base.empty:
        raise UsageError(f"--against {arm}: no such arm was timed; there are {', '.join(timed['arm'].unique())}")
    lines = []
    for _, row in timed[timed["load"].isin(base.index)].iterrows():
        mine, other = np.log(row["repeats"]), np.log(base[row["load"]])
        ratio = f"{np.exp(mine.mean() - other.mean()):.3f}"
        if row["arm"] != arm and min(len(mine), len(other)) > 1:
            interval = ttest_ind(mine, other, equal_var=False).confidence_interval()
            ratio += f" [{np.exp(interval.low):.3f}, {np.exp(interval.high):.3f}]"
        lines.append([row["load"], row["arm"], f"{np.exp(mine.mean()):,.0f}", str(len(mine)), ratio])
    return pd.DataFrame(lines, columns=["load", "arm", "mean tokens/s", "repeats", f"of {arm}"])
