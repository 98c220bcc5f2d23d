"""How many GPUs hold a limit: rates that fleets bear, and what follows for any traffic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.bench.rates import next_rate

SECONDS = 3600.0


def searched(at: Callable[[float], dict[str, Any]], low: float, high: float, steps: int) -> Iterator[dict[str, Any]]:
    """Rows of a bisection for the highest rate that holds. `at`: the row of a rate."""
    measured: dict[float, bool] = {}
    while (rate := next_rate(measured, low, high, steps)) is not None:
        row = at(rate)
        measured[rate] = row["slo_holds"]
        yield row


def bearable(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The highest rate that held, below all that did not; None where none did."""
    broken = min((row["rate"] for row in rows if not row["slo_holds"]), default=math.inf)
    return max((row["rate"] for row in rows if row["slo_holds"] and row["rate"] < broken), default=None)


def gpus_needed(rate: float, borne: Mapping[int, float]) -> int:
    """The fewest GPUs that bear a rate.

    Args:
        borne: GPUs of a fleet -> the highest rate that it bears. Beyond the largest fleet each GPU bears as much as
            there, though a larger fleet evens more out.
    """
    enough = [gpus for gpus, most in borne.items() if most >= rate]
    if enough:
        return min(enough)
    largest = max(borne)
    return math.ceil(rate * largest / borne[largest])


def dollars_per_million(rate: float, gpus: int, tokens: float, price: float) -> float:
    """Of output tokens: of a fleet that is paid by the GPU-hour and gets `rate` requests of `tokens` each a second."""
    return 1e6 * gpus * price / SECONDS / (rate * tokens)
