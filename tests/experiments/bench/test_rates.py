"""The search for the highest rate, and how it is read from rows."""

import numpy as np
import pandas as pd
import pytest

from experiments.bench.rates import highest, lowest_broken, next_rate
from experiments.errors import UsageError


def asked(limit: float, low: float = 1.0, high: float = 16.0, steps: int = 4) -> dict[float, bool]:
    """What a search asks where limits hold up to `limit`."""
    measured: dict[float, bool] = {}
    while (rate := next_rate(measured, low, high, steps)) is not None:
        assert rate not in measured
        measured[rate] = rate <= limit
    return measured


def test_a_bisection_closes_in():
    measured = asked(5.0)
    assert list(measured) == [1, 16, 4, 8, 5.66, 4.76]
    held = max(rate for rate, holds in measured.items() if holds)
    broken = min(rate for rate, holds in measured.items() if not holds)
    assert held <= 5.0 < broken
    assert broken / held == pytest.approx(16 ** (1 / 16), rel=0.01), "a sixteenth of the way, in the logarithm"


def test_a_search_ends_where_it_finds_nothing():
    assert asked(0.5) == {1: False}
    assert asked(99.0) == {1: True, 16: True}
    assert asked(5.0, steps=0) == {1: True, 16: False}
    assert len(asked(5.0, 4.99, 5.01, 50)) < 10, "rates of three digits"


def rows(*lines) -> pd.DataFrame:
    names = ("load", "arm", "rate", "slo_holds", "refused")
    return pd.DataFrame([dict(zip(names, line)) for line in lines])


MEASURED = rows(
    ("trace", "full", 1.0, True, None),
    ("trace", "full", 2.0, False, None),
    ("trace", "full", 4.0, True, None),
    ("trace", "zipage", 1.0, True, None),
    ("trace", "zipage", 4.0, True, None),
    ("trace", "vllm", 1.0, True, None),
    ("trace", "vllm", 2.0, True, None),
    ("trace", "vllm", 3.0, False, None),
    ("trace", "slow", 1.0, False, None),
    ("trace", "dead", None, None, "it died"),
)


def test_highest_rates_and_their_ratios():
    table = highest(MEASURED, "vllm").set_index("arm")
    assert list(table.loc["full", ["holds at", "breaks at", "of vllm"]]) == ["1", "2", "0.50"]
    assert list(table.loc["zipage", ["holds at", "breaks at", "of vllm"]]) == ["4", "", "2.00"]
    assert list(table.loc["slow", ["holds at", "breaks at", "of vllm"]]) == ["none", "1", ""]
    assert "dead" not in table.index
    with pytest.raises(UsageError, match="--against slow"):
        highest(MEASURED, "slow")


def test_where_an_arm_breaks():
    assert lowest_broken(MEASURED, "trace", "full") == 2.0
    assert lowest_broken(MEASURED, "trace", "zipage") is None
    assert lowest_broken([{"load": "a", "arm": "b", "rate": np.nan}], "a", "b") is None
    assert lowest_broken([], "a", "b") is None
