"""A steady state: who is at work in it, what is timed, and what is refused."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import pytest

from experiments.analysis.comparison import compare
from experiments.analysis.metrics import in_window
from experiments.config.check import check
from experiments.config.compose import load_experiment
from experiments.errors import RunError, UsageError
from experiments.records import load_requests, load_runs, load_steps
from experiments.regrade import regrade
from experiments.reporting import plots
from experiments.running.scenarios import TimedRequest
from experiments.running.steady import begun, held_entries, serve_steadily
from tests.benchmarks.steady import Clock, full_kv, measure
from tests.experiments.fake_engine import fake_backend
from zipage import EngineConfig, RequestMetrics, RequestOutput, SamplingParams, StepStats

STEADY = ["scenario=steady", "scenario.seconds=0.5", "workload=lengths", "engine.max_num_seqs=16"]


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

    def test_few_draws_are_even(self):
        drawn = [list(islice(begun(requests(*[1000] * 50), config(), seed), 50)) for seed in range(20)]
        ages = [np.mean([1000 - request.params.max_tokens for request in few]) for few in drawn]
        assert np.mean(ages) == pytest.approx(500, abs=15)
        assert np.std(ages) < 0.7 * 1000 / (12 * 50) ** 0.5  # of independent draws

    def test_one_that_is_drawn_again_shares_no_prompt_with_itself(self):
        (request,) = requests(90, prompt=0)
        request = replace(request, token_ids=list(range(40)))
        first, second, third = islice(begun([request], config(), seed=0), 3)
        assert first.token_ids[:40] == request.token_ids
        assert len({tuple(r.token_ids[:16]) for r in (first, second, third)}) == 3

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


@dataclass
class Slots:
    """Replicas that run so many samples each, a token of every one in a step of 10 ms. Prompts take a step."""

    clock: Clock
    slots: int = 64
    replicas: int = 1
    silent: int = 0
    """Calls of `step` after each step in which a replica does not tell of another."""
    step_listeners: list = field(default_factory=list)
    most_waiting: int = 0

    def __post_init__(self):
        self.queues = [deque() for _ in range(self.replicas)]
        self.running = [[] for _ in range(self.replicas)]
        self.calls = 0
        self.steps = []
        self.ended = []
        self.step_listeners.append(self.steps.append)

    def add_request(self, tokens, params, name):
        load = [sum(left for _, left in [*q, *r]) for q, r in zip(self.queues, self.running, strict=True)]
        self.queues[int(np.argmin(load))].append((name, params.max_tokens))

    def step(self):
        ended = []
        self.most_waiting = max(self.most_waiting, *map(len, self.queues))
        if self.calls % (self.silent + 1) == 0:
            self.clock.now += 0.01
            for number in range(self.replicas):
                ended += self._step(number)
        self.calls += 1
        self.ended += [(self.clock.now, output.request_id) for output in ended]
        return ended

    def _step(self, number):
        queue, before = self.queues[number], self.running[number]
        fresh = [queue.popleft() for _ in range(min(len(queue), self.slots - len(before)))]
        if not before and not fresh:
            return []  # an idle replica makes no step
        after = [(name, left - 1) for name, left in before + fresh]
        self.running[number] = [(name, left) for name, left in after if left]
        known = {"time": self.clock.now, "num_decode": len(before), "num_prefill": len(fresh), "replica": number}
        known |= {"num_running": len(self.running[number]), "num_waiting": len(queue)}
        step = StepStats(**{name: known.get(name, 0) for name in StepStats.__slots__})
        for listener in self.step_listeners:
            listener(step)
        return [RequestOutput(name, None, [], [], RequestMetrics()) for name, left in after if not left]


def serve_in_slots(some, seconds=2.0, replicas=1, **options):
    """Returns: tokens a step of the window, requests that end in a step of it, and the engine."""
    engine = Slots(Clock(), replicas=replicas, **options)
    served = serve_steadily(engine, some, config(data_parallel_size=replicas), seconds=seconds, seed=0)
    begin, end = served.window
    steps = [step for step in engine.steps if begin < step.time <= end]
    ended = [name for time, name in engine.ended if begin < time <= end]
    count = (end - begin) / 0.01
    return sum(step.num_decode for step in steps) / count, len(ended) / count, engine


class TestSteadyState:
    """Engines whose throughput is known."""

    def test_slots_are_full_and_lengths_end_as_often_as_they_come(self):
        rate, ended, _ = serve_in_slots(requests(*[20, 180] * 400))
        assert ended == pytest.approx(64 / 100, rel=0.1)  # slots over the mean length
        assert rate == pytest.approx(64 * 99 / 100, rel=0.01)  # a token in a hundred comes of a prefill

    def test_short_requests_do_not_run_dry(self):
        rate, _, engine = serve_in_slots(requests(*[4] * 8000))
        assert rate == pytest.approx(64 * 3 / 4, rel=0.02)
        assert engine.most_waiting < 200

    def test_of_one_slot(self):
        rate, ended, _ = serve_in_slots(requests(*[50] * 40), slots=1)
        assert rate == pytest.approx(49 / 50, abs=0.03)
        assert ended == pytest.approx(1 / 50, abs=0.006)

    def test_every_replica_is_full(self):
        rate, _, _ = serve_in_slots(requests(*[30, 90] * 600), replicas=3)
        assert rate == pytest.approx(3 * 64 * 59 / 60, rel=0.02)

    def test_no_flood_while_an_engine_is_silent(self):
        _, _, engine = serve_in_slots(requests(*[100] * 800), replicas=2, silent=20)
        assert engine.most_waiting <= 64

    @pytest.mark.parametrize("seed", range(3))
    def test_a_short_pool_holds_as_many_as_fit_with_requests_of_every_age(self, seed):
        held = np.mean([-(-(128 + done + 1) // 16) for done in range(3072)])  # blocks of a request, on average
        _, at_work, _ = measure(lambda clock: full_kv(clock, 5625, 16), [(128, 3072)] * 1000, 20.0, seed)
        assert at_work == pytest.approx(0.96 * 5625 / held, rel=0.04)  # 4 % stand free for those that grow


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
        assert found["tpot"]["p50"] is None
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
    assert row["seconds"] >= 0.5
    assert row["output_tokens"] < steps["num_decode"].sum()
    assert row["output_tokens_per_second"] == pytest.approx(row["output_tokens"] / row["seconds"])
    assert len(row["window_rates"]) == 10
    assert np.mean(row["window_rates"]) == pytest.approx(row["output_tokens_per_second"])
    assert 0 < len(load_requests(row)) < 4000
    assert not load_requests(row)["prompt_id"].str.startswith("begun").any()


def test_requests_that_run_out_are_told(launch, capsys):
    assert launch(*STEADY, "workload.options.output_tokens=20", "workload.options.count=4") == 1
    assert "raise workload.options.count" in capsys.readouterr().err


def test_outputs_of_one_token_are_told(launch, capsys):
    assert launch(*STEADY, "workload.options.output_tokens=1") == 1
    assert "nothing is decoded" in capsys.readouterr().err


def test_a_refused_request_does_not_cost_the_window(launch, results, tmp_path):
    """All the others are still at work at its end."""
    trace = tmp_path / "lengths.csv"
    trace.write_text("prompt_tokens,output_tokens\n" + "3000,90\n" * 100 + "8,90\n" * 500)
    lengths = ["workload.options.distribution=trace", "workload.options.count=600", f"workload.options.path={trace}"]
    assert launch(*STEADY, *lengths, "scenario.seconds=0.02", "limit=null", step_seconds=0.004, max_prompt=99) == 0
    row = load_runs(results).iloc[0]
    assert row["errors"] == row["samples"] > 0
    assert row["output_tokens_per_second"] > 0
    assert compare(load_runs(results))[["slo_share", "slo_rate"]].isna().all(axis=None)


def test_a_window_in_which_nothing_ends_is_read_like_any(launch, results):
    lengths = ["workload.options.output_tokens=90", "workload.options.count=600", "limit=null"]
    assert launch(*STEADY, *lengths, "scenario.seconds=0.02", step_seconds=0.004) == 0
    runs = load_runs(results)
    assert runs["samples"].tolist() == [0]
    assert len(regrade(runs.iloc[0])) == 0
    with pytest.raises(ValueError, match="steady"):
        plots.latency_cdfs(runs)


def test_an_engine_that_refuses_everything_ends_it():
    engine = fake_backend(max_prompt=4)["zipage"](model="m")
    with pytest.raises(RunError, match="the pool holds 4"):
        serve_steadily(engine, requests(*[9] * 9), config(), seconds=0.1, seed=0)


def test_a_request_that_the_engine_refuses_costs_itself():
    engine = fake_backend(max_prompt=300)["zipage"](model="m", max_num_seqs=16)
    some = [*requests(*[9] * 3), *(replace(r, id=f"long-{r.id}") for r in requests(9, prompt=400))]
    some += [replace(r, id=f"more-{i}") for i, r in enumerate(requests(*[9] * 2000))]
    engine.clock = clock = Clock()
    engine.step_listeners.append(lambda step: setattr(clock, "now", clock.now + 0.01))
    served = serve_steadily(engine, some, config(), seconds=0.5, seed=0)
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
        (["backend=transformers", "engine.block_size=256"], "backend='transformers'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        check(load_experiment(["scenario=steady", "workload=lengths", *options]))
