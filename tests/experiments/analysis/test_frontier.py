"""Speed over full KV in the same pool, the share of its accuracy that is left, and the claim that 95 % are."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.analysis.frontier import best_speed_up, claim, frontier, share_kept
from experiments.records import load_runs
from experiments.reporting.frontier_table import frontier_table
from tests.experiments.made_runs import make_run

POOL = "engine.kv_cache_memory_bytes"


def right(count: int, of: int = 400) -> list[float]:
    return [1.0] * count + [0.0] * (of - count)


@pytest.fixture
def runs(tmp_path):
    """Full KV in two pools; policies that keep everything, about 95 %, and half of it."""
    for gib, seconds in ((2, 20), (4, 10)):
        make_run(tmp_path, f"full-{gib}", grades=right(240), seconds=seconds, options={POOL: gib * 2**30})
    pool = {POOL: 2 * 2**30}
    make_run(tmp_path, "keeps", "r_kv", 64, grades=right(239), seconds=10, options=pool)
    make_run(tmp_path, "about", "snapkv", 64, grades=right(228), seconds=8, options=pool)
    make_run(tmp_path, "loses", "zipage", 64, grades=right(120), seconds=5, lengths=[200] * 400, options=pool)
    make_run(tmp_path, "elsewhere", "zipage", 64, grades=right(240), options={POOL: 8 * 2**30})
    return load_runs(tmp_path)


def test_each_run_stands_beside_full_kv_of_its_own_pool(runs):
    table = frontier(runs).set_index("run")
    assert set(table.index) == {"full-2", "keeps", "about", "loses"}  # no eviction ran in 4 GiB, no full KV in 8
    assert set(table["pool"]) == {"2 GiB"}
    assert set(table["pool.full"]) == {"full-2"}
    assert table["speed_up"].to_dict() == pytest.approx({"full-2": 1, "keeps": 2, "about": 2.5, "loses": 8})
    assert table.loc["loses", "answers_speed_up"] == pytest.approx(4)  # its answers are twice as long
    assert table["share"].to_dict() == pytest.approx({"full-2": 1, "keeps": 239 / 240, "about": 0.95, "loses": 0.5})


def test_the_claim_holds_fails_or_is_open(runs):
    table = frontier(runs).set_index("run")
    assert table["claim"].dropna().to_dict() == {"keeps": "holds", "about": "open", "loses": "fails"}
    assert best_speed_up(table) == pytest.approx(2)
    assert best_speed_up(table.drop("keeps")) is None
    assert frontier(runs, keep=0.4).set_index("run").loc["loses", "claim"] == "holds"
    assert [claim(0.95, 1.0), claim(0.9, 0.9499), claim(0.9, 0.95)] == ["holds", "fails", "open"]


@pytest.mark.parametrize("option", ["engine.num_blocks", "engine.max_num_seqs", "engine.gpu_memory_utilization"])
def test_other_pools_and_loads_are_not_compared(tmp_path, option):
    make_run(tmp_path, "full")
    make_run(tmp_path, "zip", "zipage", 64)
    runs = load_runs(tmp_path)
    assert len(frontier(runs)) == 2
    runs[option] = [0.5, 0.6]
    assert frontier(runs).empty


def test_the_interval_is_that_of_a_bootstrap_over_pairs():
    random = np.random.default_rng(1)
    full = (random.random(300) < 0.6).astype(float)
    mine = np.where(random.random(300) < 0.1, 1 - full, full)
    share, low, high = share_kept(mine, full)
    drawn = random.integers(300, size=(5000, 300))
    expected = np.percentile(mine[drawn].mean(1) / full[drawn].mean(1), (2.5, 97.5))
    assert share == pytest.approx(mine.mean() / full.mean())
    assert (low, high) == pytest.approx(expected, abs=0.006)
    # pairing matters: with the same accuracies of unrelated problems it is far wider
    _, low_unpaired, high_unpaired = share_kept(random.permutation(mine), full)
    assert high_unpaired - low_unpaired > 1.5 * (high - low)


def test_equal_answers_leave_some_doubt():
    full = np.array(right(20, 40))
    share, low, high = share_kept(full, full)
    assert low < share == 1 < high


def test_the_table_says_it_in_words(runs):
    table = frontier_table(frontier(runs))
    assert table["policy"].tolist() == ["full KV", "r_kv", "snapkv", "zipage"]
    assert table["keeps 95 %"].tolist() == ["-", "holds", "open", "fails"]
    assert table["tokens/s x"].tolist() == ["1.00", "2.00", "2.50", "8.00"]
    assert table["of full KV (%) [95 %]"].iloc[3].startswith("50.0 [")
    assert "recall (%)" not in table


def test_recalls_stand_beside_the_claim(tmp_path):
    for name, policy, known in (("a", "full", 1.0), ("b", "zipage", 0.25)):
        places, recalls = [[1.0]] * 20, [[known]] * 20
        make_run(tmp_path, name, policy, 64, grades=[1.0] * 20, places=places, recalls=recalls)
    assert frontier_table(frontier(load_runs(tmp_path)))["recall (%)"].tolist() == ["100.0", "25.0"]
