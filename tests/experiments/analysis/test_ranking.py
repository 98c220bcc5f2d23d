"""Policies are ranked among those of the same budget and protection, each beside the control it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import report
from experiments.analysis.comparison import compare
from experiments.analysis.ranking import COLUMNS, ranking
from experiments.analysis.statistics import paired_difference
from experiments.records import load_requests, load_runs
from experiments.reporting.ranking_table import UNTOLD, winners
from tests.experiments import made_runs
from tests.experiments.analysis.test_comparison import OF_AS_MANY_BYTES, make_run

PROBLEMS = 100
DRAWN = np.random.default_rng(0)


def graded(right: float) -> list[float]:
    return DRAWN.binomial(1, right, 2 * PROBLEMS).astype(float).tolist()


def make(folder: Path, name: str, policy: str, grades: list[float], held: float | None = 100.0, **more: Any) -> None:
    """A run of `policy`; `more` are options of it."""
    options = {"name": policy, "budget_tokens": 512} | more
    make_run(folder, name, options, grades, metrics={"kv_bytes": None if held is None else {"mean": held}})


def make_fed(folder: Path, name: str, policy: str, divergences: list[list[float]]) -> None:
    rows = {"token_divergences": divergences, "token_agrees": [[True] * len(tokens) for tokens in divergences]}
    rows |= {name: [0.0] * len(divergences) for name in ("logprob", "full_logprob")}
    metrics = {"fidelity": {"divergence": 1.0}}
    kind = {"scenario.kind": "fidelity"}
    policy = {"name": policy, "budget_tokens": 512}
    make_run(folder, name, policy, [None] * len(divergences), rows=rows, metrics=metrics, config=kind)


def ranked(folder: Path) -> pd.DataFrame:
    runs = load_runs(folder)
    table = ranking(runs)
    return table.set_index(runs.loc[table.index, "run"])


def difference(folder: Path, mine: str, other: str) -> list[float]:
    found = paired_difference(*(load_requests(folder / name) for name in (mine, other)))
    return [found.value, found.low, found.high]


def told(row: pd.Series, rival: str) -> list[float]:
    return [row[f"{rival}.{name}"] for name in ("difference", "low", "high")]


def test_each_field_has_an_order_and_a_control_of_its_own(tmp_path):
    make(tmp_path, "full", "full", graded(0.9), held=400.0)
    make(tmp_path, "good", "r_kv", graded(0.8))
    make(tmp_path, "bad", "snapkv", graded(0.3))
    make(tmp_path, "random", "random", graded(0.6))
    make(tmp_path, "good-prompt", "r_kv", graded(0.5), protection="prompt")
    make(tmp_path, "random-prompt", "random_attention", graded(0.7))
    make(tmp_path, "large", "r_kv", graded(0.9), budget_tokens=768)
    make(tmp_path, "lonely", "random", graded(0.9), budget_tokens=1024)
    table = ranked(tmp_path)
    assert list(table.columns) == list(COLUMNS)
    assert table.index.tolist() == ["good", "random", "bad", "random-prompt", "good-prompt", "large"]
    assert table["field"].tolist() == [0, 0, 0, 1, 1, 2]
    assert table["place"].tolist() == [1, 2, 3, 1, 2, 1]
    assert set(table["figure"]) == {"accuracy"}
    assert table["random.run"].fillna("").tolist() == ["random", "", "random", "", "random-prompt", ""]
    assert told(table.loc["good-prompt"], "random") == pytest.approx(
        difference(tmp_path, "good-prompt", "random-prompt")
    )
    assert told(table.loc["bad"], "best") == pytest.approx(difference(tmp_path, "bad", "good"))
    assert table["best.run"].fillna("").tolist() == ["", "good", "good", "", "random-prompt", ""]
    assert table.loc["good", "value.low"] < table.loc["good", "value"] < table.loc["good", "value.high"]
    assert table["bytes_of_full"].unique().tolist() == [0.25]


def test_runs_loaded_apart_and_put_together_rank_as_those_loaded_at_once(tmp_path):
    """Their labels repeat: each part counts from 0."""
    make(tmp_path / "a", "best", "snapkv", graded(0.9))
    make(tmp_path / "b", "random", "random", graded(0.3))
    apart = pd.concat([load_runs(tmp_path / part) for part in "ab"])
    table = ranking(apart)
    assert table["place"].tolist() == [1, 2]
    assert table["best.run"].tolist()[1:] == ["best"]
    pd.testing.assert_frame_equal(table.reset_index(drop=True), ranking(apart.reset_index(drop=True)))


@pytest.mark.parametrize(("held", "found"), OF_AS_MANY_BYTES)
def test_the_control_of_as_many_bytes_is_found_by_the_rule_of_the_comparison(tmp_path, held, found):
    """Among those that protect the same."""
    make(tmp_path, "run", "r_kv", graded(0.8), held=100.0)
    make(tmp_path, "prompt", "random", graded(0.6), held=100.0, protection="prompt")
    for budget, (name, mean) in enumerate(held.items(), 600):
        make(tmp_path, name, "random", graded(0.6), held=mean, budget_tokens=budget)
    table = ranked(tmp_path)
    assert table["bytes.run"].dropna().to_dict() == ({"run": found} if found else {})
    if found:
        assert told(table.loc["run"], "bytes") == pytest.approx(difference(tmp_path, "run", found))


def test_unequal_budgets_are_set_beside_equal_ones_of_the_same_options(tmp_path):
    make(tmp_path, "equal", "snapkv", graded(0.6), allocation="uniform", options={"window": 8})
    make(tmp_path, "other", "snapkv", graded(0.6), allocation="uniform", options={"window": 16})
    make(tmp_path, "unequal", "snapkv", graded(0.7), allocation="adaptive", options={"window": 8})
    table = ranked(tmp_path)
    assert table["uniform.run"].dropna().to_dict() == {"unequal": "equal"}
    assert told(table.loc["unequal"], "uniform") == pytest.approx(difference(tmp_path, "unequal", "equal"))


def test_divergence_ranks_from_below_paired_by_text_and_weighed_by_tokens(tmp_path):
    sizes = DRAWN.integers(5, 20, 60)
    base = [DRAWN.exponential(0.02, size).tolist() for size in sizes]
    less = [[0.5 * x for x in tokens] for tokens in base]
    make_fed(tmp_path, "random", "random", base)
    make_fed(tmp_path, "close", "r_kv", less)
    make_fed(tmp_path, "other", "snapkv", [[*tokens, 0.5] for tokens in base])
    table = ranked(tmp_path)
    assert table.index.tolist() == ["close", "random", "other"]
    assert set(table["figure"]) == {"divergence"}
    value, low, high = told(table.loc["close"], "random")
    assert value == pytest.approx(-0.5 * sum(map(sum, base)) / sizes.sum())
    assert low < value < high < 0
    alone = table.loc["close", "value.high"] - table.loc["close", "value.low"]
    assert high - low == pytest.approx(alone, rel=0.05), "half of it is the run itself: paired"
    assert np.isnan(told(table.loc["other"], "random")).all(), "fed other texts"
    runs = load_runs(tmp_path)
    (row,) = winners(runs, compare(runs), ranking(runs)).to_dict("records")
    assert (row["best"], row[UNTOLD]) == ("r_kv", "snapkv"), "what can't be compared is not told apart"


def test_the_report_says_who_wins_and_who_is_not_told_apart(tmp_path, capsys):
    def made(name: str, policy: str, grades: list[float], options: dict[str, Any]) -> None:
        made_runs.make_run(tmp_path / "runs", name, policy, 512, grades=grades, options=options)

    best = graded(0.8)
    made("full", "full", [1.0] * len(best), {})
    made("good", "critical", best, {"policy.options": {"base": "h2o"}})
    made("as-good", "critical", [1.0, *best[1:]], {"policy.options": {"base": "snapkv"}})
    made("random", "random", graded(0.3), {})
    assert report.main([str(tmp_path / "runs"), "--ranking", "--tables", str(tmp_path / "tables")]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "tables" / "ranking.md").read_text()
    assert text.strip() in printed
    assert "sums, tiny, 512 entries\n" in printed
    heading, _, line = text.strip().splitlines()
    row = dict(zip(*([cell.strip() for cell in part.split("|")[1:-1]] for part in (heading, line)), strict=True))
    assert {row["best"], row[UNTOLD]} == {"critical (base=h2o)", "critical (base=snapkv)"}
    assert row["less random"].startswith("+")
    assert row["less full KV"].startswith("-")
    assert sorted(pd.read_csv(tmp_path / "tables" / "ranking.csv")["place"]) == [1, 2, 3]


def test_nothing_to_rank_is_an_error(tmp_path, capsys):
    made_runs.make_run(tmp_path, "full")
    assert report.main([str(tmp_path), "--ranking"]) == 2
    assert "--ranking: no evicting policy was graded" in capsys.readouterr().err
