"""The highest rate at which limits hold: how it is searched for, and how it is read from rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


def next_rate(measured: Mapping[float, bool], low: float, high: float, steps: int) -> float | None:
    """The rate that a bisection asks for next: `low`, `high`, then so many times the geometric middle between the
    highest that held and the lowest that did not.

    Args:
        measured: rates, and whether the limits held there.

    Returns:
        None at the end of the search, which is also where `low` does not hold or `high` does.
    """
    if low not in measured:
        return low
    if not measured[low]:
        return None
    if high not in measured:
        return high
    if measured[high]:
        return None
    for _ in range(steps):
        middle = float(f"{math.sqrt(low * high):.3g}")
        if middle in (low, high):
            return None
        if middle not in measured:
            return middle
        low, high = (middle, high) if measured[middle] else (low, middle)
    return None


def lowest_broken(rows: pd.DataFrame | list[dict], load: str, arm: str) -> float | None:
    """The lowest rate at which an arm's limits did not hold; None where they always did."""
    import pandas as pd

    rows = pd.DataFrame(rows).to_dict("records")
    mine = [row for row in rows if (row["load"], row["arm"]) == (load, arm) and pd.notna(row.get("rate"))]
    return min((row["rate"] for row in mine if row.get("slo_holds") is False), default=None)


def highest(rows: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Of each server the highest rate at which the limits held, and the lowest at which they did not.

    They are of single measurements: near the edge another one may come out otherwise. A rate that held above one that
    did not counts for nothing.

    Args:
        rows: of `load_rows`.
        against: an arm, for the ratio of highest rates to its own under the same load.

    Returns:
        Text: load, arm, "holds at", "breaks at", and the ratio; no rows where no rates were measured.

    Raises:
        UsageError: no load has a highest rate of that arm.
    """
    import pandas as pd

    found = {}
    for (load, arm), mine in rows[rows["rate"].notna() & rows["refused"].isna()].groupby(["load", "arm"], sort=False):
        held = mine["slo_holds"].astype(bool)
        broken = mine["rate"][~held].min()
        below = mine["rate"][held & ~(mine["rate"] > broken)].max()
        found[load, arm] = below, broken
    if against is not None and not any(arm == against and below == below for (_, arm), (below, _) in found.items()):
        raise UsageError(f"--against {against}: no such arm has a rate at which the limits held")
    lines = []
    for (load, arm), (below, broken) in found.items():
        line = [load, arm, "none" if math.isnan(below) else f"{below:g}", "" if math.isnan(broken) else f"{broken:g}"]
        if against is not None:
            base = found.get((load, against), (math.nan, math.nan))[0]
            line.append("" if math.isnan(below / base) else f"{below / base:.2f}")
        lines.append(line)
    named = [] if against is None else [f"of {against}"]
    return pd.DataFrame(lines, columns=["load", "arm", "holds at", "breaks at", *named])
