"""Fleets of simulated replicas, routers, and how many GPUs a traffic needs."""

import json
from random import Random
from types import SimpleNamespace

import pytest

from experiments import simulate
from experiments.errors import UsageError
from experiments.serving.figures import quantile
from experiments.serving.prompts import Asked
from experiments.simulation import pictures
from experiments.simulation.capacity import bearable, dollars_per_million, gpus_needed
from experiments.simulation.fleet import Tails, simulate_fleet
from experiments.simulation.machine import read_machine
from experiments.simulation.routers import find_router
from experiments.simulation.serve_command import arms_of, load_parser
from experiments.simulation.serving import simulate_rate

LOAD = """
lengths: {count: 64, prompt_tokens: 60, output_tokens: 100, distribution: lognormal, longest: 400}
rates: [1]
slo: {ttft: 0.5, itl: 0.1}
warmup: 1
seconds: 4
drain: 8
patience: 2
engine: {max_num_seqs: 16, max_model_len: 1024, block_size: 64, enable_prefix_caching: false,
  kv_cache_memory_bytes: 234881024}
arms:
  full: {}
"""


@pytest.fixture(name="words")
def words_of_load(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(LOAD)
    return [str(path), "--model", "models/qwen3-0.6b-shape"]


def test_tails_are_quantiles_to_one_percent():
    random, tails = Random(0), Tails()
    values = [random.lognormvariate(-3, 1) for _ in range(100_000)]
    for begin in range(0, len(values), 1000):
        tails.add((value, 1) for value in values[begin : begin + 1000])
    found = tails.quantiles()
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[name] == pytest.approx(quantile(sorted(values), share), rel=0.01)
    assert Tails().quantiles() is None


def test_a_fleet_of_one_is_a_server(words):
    (arm,) = arms_of(load_parser("fleet", "").parse_args(words))
    machine = read_machine("h100")
    alone, fleet = simulate_rate(arm, machine, 20.0), simulate_fleet(arm, machine, 1, "least_tokens", 20.0)
    assert fleet["finished"] == alone["finished"] > 50
    for name in ("ttft", "itl", "e2e", "tpot"):
        assert fleet[name]["p50"] == pytest.approx(alone[name]["p50"], rel=0.03)
        assert fleet[name]["p99"] == pytest.approx(alone[name]["p99"], rel=0.03)


def test_a_balanced_fleet_waits_less_than_one_that_takes_turns(words):
    (arm,) = arms_of(load_parser("fleet", "").parse_args(words))
    machine = read_machine("h100")
    rows = {name: simulate_fleet(arm, machine, 3, name, 60.0) for name in ("round_robin", "least_tokens")}
    assert rows["least_tokens"]["measured"] == rows["round_robin"]["measured"]
    assert rows["least_tokens"]["ttft"]["p90"] < rows["round_robin"]["ttft"]["p90"]


def test_routers():
    replicas = [SimpleNamespace(left=left) for left in (500, 100, 300)]
    request = Asked(0.0, 1024, 10, (1, 2))
    turns = find_router("round_robin")
    assert [turns(request, replicas) for _ in range(4)] == [0, 1, 2, 0]
    assert find_router("least_tokens")(request, replicas) == 1
    aware = find_router("prefix_aware")
    assert aware(request, replicas) == 1
    replicas[1].left = 400
    assert aware(request, replicas) == 1  # where its prefix is
    assert aware(request._replace(blocks=(7,)), replicas) == 2
    replicas[1].left = 10**6
    assert aware(request, replicas) == 2  # far too busy
    with pytest.raises(UsageError, match="round_robin"):
        find_router("random")


def test_gpus_for_a_traffic():
    rows = [{"rate": rate, "slo_holds": holds} for rate, holds in ((1, True), (2, True), (3, False), (4, True))]
    assert bearable(rows) == 2
    assert bearable(rows[2:3]) is None
    borne = {1: 2.0, 2: 5.0}
    assert [gpus_needed(rate, borne) for rate in (1, 2, 2.1, 5, 5.1, 100)] == [1, 1, 2, 2, 3, 40]
    assert dollars_per_million(100.0, 40, 1000.0, 3.6) == pytest.approx(40 * 3.6 / 3600 / 0.1)


def test_capacity_says_gpus_cost_and_that_it_is_simulated(words, tmp_path, capsys):
    out, picture = tmp_path / "capacity.json", tmp_path / "gpus.png"
    options = ["--budgets", "full", "128", "--replicas", "1", "--low", "5", "--high", "500", "--steps", "2"]
    options += ["--traffic", "5", "1000", "--out", str(out), "--picture", str(picture)]
    assert simulate.main(["capacity", *words, *options]) == 0
    assert "Simulated on H100" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["simulated"]["name"] == "H100"
    assert found["command"].startswith("python -m experiments.simulate capacity")
    assert found["needed"]["full KV"]["5.0"] == 1
    assert found["needed"]["full KV"]["1000.0"] > 2
    assert picture.stat().st_size > 10_000
    again = tmp_path / "again.png"
    assert pictures.main([str(out), "--out", str(again)]) == 0
    assert again.stat().st_size == pytest.approx(picture.stat().st_size, rel=0.05)


def test_options_that_make_no_sense(words, capsys):
    assert simulate.main(["fleet", *words]) == 2
    assert "--rates" in capsys.readouterr().err
    assert simulate.main(["capacity", *words, "--budgets", "half"]) == 2
    assert "full or a number" in capsys.readouterr().err
    assert simulate.main(["fleet", *words, "--rates", "1", "--replicas", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_a_search_that_ends_where_the_limits_hold_finds_nothing(words, capsys):
    assert simulate.main(["capacity", *words, "--low", "0.5", "--high", "1", "--steps", "1", "--replicas", "1"]) == 2
    assert "--high 1: full KV bears as much a GPU, or more; search higher" in capsys.readouterr().err
