"""Tables of what one option changes."""

from __future__ import annotations

import pandas as pd

from experiments.config.options import readable_options
from experiments.reporting.tables import by_option, varied_options


def runs() -> pd.DataFrame:
    rows = [("full", "none", None), ("zipage", "none", 512.0), ("zipage", "prompt", 512.0), ("zipage", "none", 1024.0)]
    table = pd.DataFrame(rows, columns=["policy.name", "policy.protection", "policy.budget_tokens"])
    table["model.name"], table["workload.name"], table["workload.options.distance"] = "m", "w", [[1, 2]] * 4
    table["accuracy"], table["accuracy.low"], table["accuracy.high"] = [1.0, 0.2, 0.5, 0.8], 0.1, 1.0
    return table


def test_varied_options():
    assert varied_options(runs()) == ["policy.name", "policy.protection", "policy.budget_tokens"]


def test_options_that_only_tell_workloads_apart_do_not_vary():
    both = pd.concat([runs().iloc[[0]], runs().iloc[[0]].assign(**{"workload.name": "v", "workload.seed": 1})])
    assert varied_options(both) == []


def test_settings_beside_each_other():
    table = by_option(runs(), runs(), "policy.budget_tokens")
    assert list(table) == ["policy.budget_tokens=512", "policy.budget_tokens=1024"]
    assert table.iloc[0].tolist() == ["20.0 [10.0, 100.0]", "80.0 [10.0, 100.0]"]


def test_budgets_are_those_that_held():
    table = runs().assign(**{"engine.block_size": 256, "policy.budget_tokens": [None, 300, 300, 400]})
    assert "policy.budget_tokens" in varied_options(table), "full KV has none"
    assert varied_options(table.iloc[1:]) == ["policy.protection"]
    assert by_option(table, table, "policy.budget_tokens").empty
    (heading, _) = by_option(table, table, "policy.protection")
    assert heading == "policy.protection=none"


def test_an_option_that_never_varies_alone_tells_nothing():
    assert by_option(runs(), runs(), "policy.name").empty


def test_a_record_from_before_there_was_an_option_has_its_default():
    known = runs().assign(**{"engine.block_size": [16, None, 256, 256]})
    assert readable_options(known, ["engine.block_size"])["engine.block_size"].tolist() == ["16", "256", "256", "256"]
    assert "engine.block_size" not in varied_options(known.iloc[1:])
