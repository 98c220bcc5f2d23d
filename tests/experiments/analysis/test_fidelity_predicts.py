"""How well fidelity predicts accuracy: the arms that two sets of runs share, and the rank correlation over them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from experiments import records
from experiments.analysis.fidelity import predicts, shared_arms
from experiments.records import load_runs
from tests.experiments.made_runs import make_run


def measured(folder, name: str, divergence: float, policy: str, budget: int | None, protection="none", **more):
    """A run of fidelity, ungraded."""
    run = make_run(folder, name, policy, budget, protection, grades=[None] * 20, **more)
    path = run / records.METRICS
    metrics = json.loads(path.read_text())
    metrics["fidelity"] = {"divergence": divergence, "agreement": 1 - divergence}
    path.write_text(json.dumps(metrics))


def right(count: int) -> list[float]:
    return [1.0] * count + [0.0] * (100 - count)


@pytest.fixture
def folders(tmp_path):
    """Six arms; fidelity ranks two neighbours the other way round."""
    close, graded = tmp_path / "fidelity", tmp_path / "accuracy"
    measured(close, "full", 0.0, "full", None)
    make_run(graded, "full", grades=right(90))
    for i, (divergence, count) in enumerate([(0.01, 80), (0.02, 60), (0.03, 70), (0.04, 50), (0.05, 40), (0.06, 30)]):
        measured(close, f"a{i}", divergence, "zipage", 64 * (i + 1))
        make_run(graded, f"a{i}", "zipage", 64 * (i + 1), grades=right(count))
    return close, graded


def test_arms_are_matched_by_all_that_makes_one(folders):
    close, graded = folders
    measured(close, "protected", 0.2, "zipage", 64, "prompt")
    measured(close, "other-policy", 0.2, "snapkv", 64)
    measured(close, "other-recent", 0.2, "zipage", 64, options={"policy.recent_tokens": 32})
    measured(close, "other-interval", 0.2, "zipage", 64, options={"policy.interval": 128})
    measured(close, "other-workload", 0.2, "zipage", 64, options={"workload.name": "traces"})
    measured(close, "control", 0.3, "random_attention", 64, "prompt")
    make_run(graded, "control", "random", 64, "prompt", grades=right(10))
    make_run(graded, "again", "zipage", 64, grades=right(70), options={"seed": 1})
    arms = shared_arms(load_runs(close), load_runs(graded))
    assert arms["budget"].tolist() == [64, 128, 192, 256, 320, 384, 64]
    assert arms["divergence"].tolist() == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.3]
    assert arms["accuracy"].tolist() == [0.75, 0.6, 0.7, 0.5, 0.4, 0.3, 0.1]  # the first ran twice
    assert (arms["accuracy.low"] < arms["accuracy"]).all()


def test_the_correlation_is_spearmans_with_an_interval_over_arms(folders):
    found = predicts(*map(load_runs, folders)).set_index("figure")
    expected = spearmanr([1, 2, 3, 4, 5, 6], [80, 60, 70, 50, 40, 30]).statistic
    assert found["arms"].tolist() == [6, 6]
    assert found["correlation"].to_dict() == pytest.approx({"divergence": expected, "agreement": -expected})
    assert -1 <= found.loc["divergence", "low"] < expected < found.loc["divergence", "high"] < 0
    assert found.loc["agreement", ["low", "high"]].tolist() == pytest.approx(
        (-found.loc["divergence", ["high", "low"]]).tolist()
    )
    assert predicts(*map(load_runs, folders)).equals(predicts(*map(load_runs, folders)))


def test_few_arms_tell_nothing(folders):
    close, graded = map(load_runs, folders)
    assert predicts(close[close["policy.budget_tokens"] <= 192], graded).empty
    assert predicts(graded, graded).empty
    assert shared_arms(close, close).empty
    assert np.isfinite(predicts(close, graded)["correlation"]).all()
