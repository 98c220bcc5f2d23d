"""How near a simulation is meant to come, and how many figures do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.markdown import markdown

AIMS = {"tokens_per_second": 0.03} | dict.fromkeys(("steps", "preemptions", "pauses", "compressions"), 0.02)
AIMS |= {f"{name}.{share}": 0.1 for name in ("ttft", "e2e") for share in ("p50", "p99")}
"""The most that a figure may be off."""
TITLES = {"tokens_per_second": "tokens/s", "ttft.p50": "TTFT p50", "ttft.p99": "TTFT p99"}
TITLES |= {"e2e.p50": "E2E p50", "e2e.p99": "E2E p99"}


def figure(measured: float | None, simulated: float | None) -> dict[str, Any]:
    """A figure of a row; `off` is None where nothing was measured, or none."""
    return {
        "measured": measured,
        "simulated": simulated,
        "off": simulated / measured - 1 if measured and simulated is not None else None,
    }


def pair(figure: dict[str, Any], form: str = "{:g}", scale: float = 1) -> str:
    """Measured / simulated."""
    values = (figure["measured"], figure["simulated"])
    return " / ".join("-" if value is None else form.format(scale * value) for value in values)


def off(figure: dict[str, Any]) -> float | None:
    """By how much a figure is off, either way; infinitely where none was measured and some are simulated."""
    measured, simulated = figure["measured"], figure["simulated"]
    if measured is None or simulated is None:
        return None
    if not measured:
        return math.inf if simulated else 0.0
    return abs(simulated / measured - 1)


def aims_table(kinds: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """For each aim and kind of row how many reach it, the median and the worst error, in Markdown; of rows that nothing
    was fitted to.
    """
    predicted = {
        kind: found
        for kind, rows in kinds.items()
        if (found := [row for row in rows if not row.get("refused") and not row.get("fitted")])
    }
    cells = []
    for name, aim in AIMS.items():
        texts = []
        for rows in predicted.values():
            found = [value for row in rows if name in row and (value := off(row[name])) is not None]
            reached = sum(value <= aim for value in found)
            texts.append(
                f"{reached} of {len(found)}, {_percent(statistics.median(found))}, {_percent(max(found))}"
                if found
                else ""
            )
        if any(texts):
            cells.append([TITLES.get(name, name), f"{aim:.0%}", *texts])
    verdicts = [[row["slo_holds"] for row in rows if "slo_holds" in row] for rows in predicted.values()]
    if any(verdicts):
        same = [sum(verdict["measured"] == verdict["simulated"] for verdict in kind) for kind in verdicts]
        texts = [f"{count} of {len(kind)}" if kind else "" for count, kind in zip(same, verdicts)]
        cells.append(["limits hold or not", "same", *texts])
    return markdown(["figure", "aim", *(f"{kind}: reached, median, most" for kind in predicted)], cells)


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < math.inf else "some for none"
