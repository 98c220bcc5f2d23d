"""A steady state: who is at work in it, what is timed, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from experiments.analysis.metrics import in_window
from experiments.config.check import check
from experiments.config.compose import load_experiment
from experiments.errors import RunError, UsageError
from experiments.records import load_requests, load_runs, load_steps
from experiments.running.scenarios import TimedRequest
from experiments.running.steady import begun, held_entries, serve_steadily
from tests.experiments.fake_engine import fake_backend
from zipage import EngineConfig, SamplingParams

STEADY = ["scenario=steady", "scenario.seconds=0.5", "workload=lengths"]


def config(**options) -> EngineConfig:
    return EngineConfig(model="m", block_size=16, **options)


def requests(*outputs: int, prompt: int = 8, n: int = 1) -> list[TimedRequest]:
    return [
        TimedRequest(f"{i}", [i + 1] * prompt, SamplingParams(n=n, max_tokens=output, ignore_eos=True))
        for i, output in enumerate(outputs)
    ]


class TestHeldEntries:
    def test_full_kv_holds_everything(self):
        assert held_entries(config(), 100, 900) == 1000

    @pytest.mark.parametrize(
        ("done", "held"), [(0, 30), (18, 48), (19, 49 + 19 % 16), (20, 49 + 20 % 16), (31, 64), (32, 49)]
    )
    def test_a_bounded_one_holds_its_budget_and_up_to_a_block_more(self, done, held):
        assert held_entries(config(policy="zipage", budget_tokens=40), 30, done) == held

    def test_or_an_interval(self):
        bounded = config(policy="zipage", budget_tokens=48, interval=64)
        assert {held_entries(bounded, 0, done) for done in range(64, 128)} == set(range(49, 113))

    def test_under_pressure_perhaps_everything(self):
        assert held_entries(config(policy="zipage", budget_tokens=48, trigger="pressure"), 30, 900) == 930


class TestBegun:
    def test_requests_are_at_work_in_proportion_to_their_outputs_and_at_any_place(self):
        drawn = list(islice(begun(requests(100, 300), config(), seed=0), 4000))
        long = [request for request in drawn if request.token_ids[0] == 2]
        assert len(long) / len(drawn) == pytest.approx(0.75, abs=0.03)
        done = [len(request.token_ids) - 8 for request in long]
        assert np.mean(done) == pytest.approx(149.5, abs=6)
        assert min(done) < 3
        assert max(done) > 296
        assert {len(request.token_ids) + request.params.max_tokens for request in long} == {308}

    def test_an_evicting_one_begins_with_what_it_would_hold(self):
        bounded = config(policy="zipage", budget_tokens=32)
        for request in islice(begun(requests(500), bounded, seed=0), 200):
            done = 500 - request.params.max_tokens
            assert len(request.token_ids) == held_entries(bounded, 8, done)

    def test_what_stands_for_output_is_not_protected(self):
        protected = config(policy="random", budget_tokens=32, protection="prompt")
        (first,) = islice(begun(requests(500), protected, seed=0), 1)
        assert first.params.protection == "none"
        (first,) = islice(begun(requests(500), config(), seed=0), 1)
        assert first.params.protection is None

    def test_samples_of_a_prompt_have_it_in_common_and_began_together(self):
        first, second, other = islice(begun(requests(90, n=2, prompt=40), config(), seed=1), 3)
        assert first.token_ids[:40] == second.token_ids[:40]
        assert len(first.token_ids) == len(second.token_ids) != len(other.token_ids)
        assert (first.params.n, first.params.seed != second.params.seed) == (1, True)


class TestWindow:
    def steps(self):
        step = {"num_prefill": 0, "prefill_tokens": 3, "num_preempted": 1, "num_paused": 2, "num_running": 9}
        step |= {"blocks_used": 7, "query_slots_used": 0}
        return [step | {"time": 0.25 * i, "num_decode": i} for i in range(1, 13)]

    def test_only_what_the_window_holds_counts(self):
        event = {"kind": "compress", "entries_before": 50, "entries_after": 20}
        events = [event | {"time": time} for time in (0.9, 1.1, 1.9, 2.1)]
        found = in_window(self.steps(), events, (1.0, 2.0), evicts=True)
        assert found["output_tokens"] == 5 + 6 + 7 + 8
        assert found["output_tokens_per_second"] == 26
        assert found["total_tokens_per_second"] == 26 + 4 * 3
        assert found["kv_bytes"]["max"] is None  # of the short requests that ended
        assert (found["steps"], found["preemptions"], found["pauses"]) == (4, 4, 8)
        assert (found["compressions"], found["entries_evicted"], found["budget_never_bound"]) == (2, 60, False)

    def test_its_parts_are_measurements(self):
        rates = in_window(self.steps(), [], (0.125, 2.625), evicts=False)["window_rates"]
        assert rates == [4 * i for i in range(1, 11)]

    def test_a_budget_that_never_bound_is_told(self):
        assert in_window(self.steps(), [], (0.0, 2.5), evicts=True)["budget_never_bound"]


def test_a_run_times_its_window_alone(launch, results):
    lengths = ["workload.options.output_tokens=20", "workload.options.count=4000", "limit=null"]
    assert launch(*STEADY, *lengths, step_seconds=0.002) == 0
    row = load_runs(results).iloc[0]
    steps = load_steps(row)
    assert row["seconds"] == pytest.approx(0.5, abs=0.1)
    assert row["output_tokens"] < steps["num_decode"].sum()
    assert row["output_tokens_per_second"] == pytest.approx(row["output_tokens"] / row["seconds"])
    assert len(row["window_rates"]) == 10
    assert np.mean(row["window_rates"]) == pytest.approx(row["output_tokens_per_second"])
    assert 0 < len(load_requests(row)) < 4000
    assert not load_requests(row)["prompt_id"].str.startswith("begun").any()


def test_requests_that_run_out_are_told(launch, capsys):
    assert launch(*STEADY, "workload.options.output_tokens=20", "workload.options.count=4") == 1
    assert "raise workload.options.count" in capsys.readouterr().err


def test_an_engine_that_refuses_everything_ends_it():
    (engine,) = (factory(model="m") for factory in fake_backend(max_prompt=4).values())
    with pytest.raises(RunError, match="the pool holds 4"):
        serve_steadily(engine, requests(*[9] * 9), config(), seconds=0.1, seed=0)


def test_a_request_that_the_engine_refuses_costs_itself():
    (engine,) = (factory(model="m") for factory in fake_backend(max_prompt=300, step_seconds=0.002).values())
    some = [*requests(*[9] * 3), *(replace(r, id=f"long-{r.id}") for r in requests(9, prompt=400))]
    some += [replace(r, id=f"more-{i}") for i, r in enumerate(requests(*[9] * 2000))]
    served = serve_steadily(engine, some, config(), seconds=0.1, seed=0)
    refused = [name for name, output in served.outputs.items() if output.error is not None]
    assert refused == ["long-0"]
    assert len(served.outputs) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["scenario.seconds=0"], "scenario.seconds=0"),
        (["scenario.seconds=null"], "scenario.seconds=None"),
        (["+sampling.policy=full"], "sampling.policy='full'"),
        (["workload=gsm8k"], "workload.generator=None"),
        (["scenario=all_at_once", "+scenario.seconds=3"], "scenario.seconds=3"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        check(load_experiment(["scenario=steady", "workload=lengths", *options]))
