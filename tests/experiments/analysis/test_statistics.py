"""Intervals cover what they should, verdicts follow them, and loops are found."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from experiments.analysis import bootstrap
from experiments.analysis.loops import is_loop, loop_rate
from experiments.analysis.statistics import (
    Interval,
    clustered_mean,
    difference_intervals,
    mean_intervals,
    non_inferiority,
    paired_difference,
    power_warning,
)
from experiments.paths import ROOT
from experiments.records import load_requests

SIMULATIONS, FEWER = 1_000, 2_000
SETTINGS = [(problems, samples, p) for problems in (64, 512) for samples in (1, 4) for p in (0.5, 0.9)]


def abilities(random: np.random.Generator, shape: tuple[int, ...], p: np.ndarray, correlation: float) -> np.ndarray:
    """The chance of each problem: beta distributed, so that two samples of a problem have this correlation."""
    strength = (1 - correlation) / correlation
    return random.beta(p * strength, (1 - p) * strength, size=shape)


def around(random: np.random.Generator, p: float) -> np.ndarray:
    """Shares near p, one a simulation: with one sample a problem, coverage jumps with p from 93 to 97 %."""
    return random.uniform(p - 0.05, p + 0.05, size=(SIMULATIONS, 1))


def coverage(intervals: list[Interval], truths: np.ndarray) -> float:
    return float(np.mean([i.low <= truth <= i.high for i, truth in zip(intervals, truths.ravel(), strict=True)]))


class TestCoverage:
    @pytest.mark.parametrize(("problems", "samples", "p"), SETTINGS)
    def test_of_a_mean(self, problems, samples, p):
        random = np.random.default_rng([problems, samples])
        truth = around(random, p)
        right = random.binomial(samples, abilities(random, (SIMULATIONS, problems), truth, 0.3))
        intervals = mean_intervals(right, np.full_like(right, samples), resamples=FEWER)
        assert 0.93 <= coverage(intervals, truth) <= 0.97

    @pytest.mark.parametrize(("problems", "samples", "p"), SETTINGS)
    def test_of_a_difference(self, problems, samples, p):
        random = np.random.default_rng([problems, samples, 1])
        truth = around(random, p)
        first = abilities(random, (SIMULATIONS, problems), truth, 0.3)
        second = first * 0.95  # the same problems are hard
        a, b = random.binomial(samples, first), random.binomial(samples, second)
        intervals = difference_intervals((b - a) / samples, np.full(SIMULATIONS, 2 * samples * problems), 0.95, FEWER)
        assert 0.93 <= coverage(intervals, -0.05 * truth) <= 0.97

    def test_unequal_numbers_of_samples(self):
        random = np.random.default_rng(5)
        truth = around(random, 0.6)
        sizes = random.integers(1, 6, size=(SIMULATIONS, 64))
        right = random.binomial(sizes, abilities(random, (SIMULATIONS, 64), truth, 0.3))
        assert 0.93 <= coverage(mean_intervals(right, sizes, resamples=FEWER), truth) <= 0.97

    def test_samples_of_a_problem_are_no_independent_answers(self):
        """What is tested above can fail: the same answers as if every sample were a problem of its own."""
        random = np.random.default_rng(6)
        truth = around(random, 0.5)
        chances = np.repeat(abilities(random, (SIMULATIONS, 64), truth, 0.3), 4, axis=1)
        right = random.binomial(1, chances)
        assert coverage(mean_intervals(right, np.ones_like(right), resamples=FEWER), truth) < 0.9

    def test_rare_answers(self):
        """Where the bootstrap alone covers 87 %."""
        random = np.random.default_rng(7)
        right = random.binomial(1, 0.95, size=(SIMULATIONS, 64))
        assert coverage(mean_intervals(right, np.ones_like(right)), np.full(SIMULATIONS, 0.95)) >= 0.93


class TestMean:
    def test_is_over_samples(self):
        interval = clustered_mean([1, 1, 1, 0], ["a", "a", "a", "b"])
        assert (interval.value, interval.clusters, interval.samples) == (0.75, 2, 4)
        assert 0 <= interval.low < 0.75 < interval.high <= 1

    def test_equals_its_batch_and_itself(self):
        random = np.random.default_rng(0)
        grades = random.binomial(8, 0.6, size=(3, 400)) / 8
        problems = np.arange(400) // 4
        alone = [clustered_mean(run, problems, seed=3) for run in grades]
        assert alone == [clustered_mean(run, [f"p{i}" for i in problems], seed=3) for run in grades]
        sums = grades.reshape(3, 100, 4).sum(2)
        assert alone == mean_intervals(sums, np.full((3, 100), 4), seed=3)
        assert alone[0] != clustered_mean(grades[0], problems, seed=4)

    def test_is_the_classical_interval_where_that_holds(self):
        grades = np.random.default_rng(1).binomial(1, 0.5, size=4000)
        interval = clustered_mean(grades, range(4000))
        error = math.sqrt(0.25 / 4000)
        assert interval.standard_error == pytest.approx(error, rel=0.01)
        assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * error, rel=0.03)
        assert clustered_mean(grades, range(4000), confidence=0.8).low > interval.low

    @pytest.mark.parametrize("grade", [0.0, 1.0])
    def test_all_right_or_all_wrong_is_no_certainty(self, grade):
        """Wilson's interval on the problems, whatever the samples: z^2 / (n + z^2) for t instead of z."""
        for samples in (1, 8):
            interval = clustered_mean([grade] * 50 * samples, list(range(50)) * samples)
            width = 2.0096**2 / (50 + 2.0096**2)
            assert interval.value == grade
            assert interval.high - interval.low == pytest.approx(width, abs=1e-4)
            assert interval.low <= grade <= interval.high

    def test_equal_partial_grades_are_no_certainty_either(self):
        interval = clustered_mean([0.1] * 300, range(300))
        assert interval.value == pytest.approx(0.1)
        assert 0.02 < interval.value - interval.low < 0.04
        assert 0.03 < interval.high - interval.value < 0.05

    def test_one_problem(self):
        interval = clustered_mean([1, 0, 1, 1], ["a"] * 4)
        assert (interval.value, interval.clusters, interval.samples) == (0.75, 1, 4)
        assert interval.high - interval.low > 0.5
        assert clustered_mean([1.0], ["a"]).low == pytest.approx(1 / (1 + 1.96**2), abs=1e-3)

    def test_ungraded_samples_are_dropped_and_wrong_ones_are_not(self):
        kept = clustered_mean([1, 0, 1], ["a", "b", "c"])
        assert clustered_mean([1, None, 0, float("nan"), 1], ["a", "a", "b", "d", "c"]) == kept

    @pytest.mark.parametrize(
        ("values", "clusters", "options", "message"),
        [
            ([1], ["a", "b"], {}, "clusters: 2 for 1 values"),
            ([None, math.nan], ["a", "b"], {}, "no sample is graded"),
            ([], [], {}, "no sample is graded"),
            ([2.0], ["a"], {}, r"must be in \[0, 1\]"),
            ([0.5, -1], ["a", "b"], {}, r"must be in \[0, 1\]"),
            ([2, 0], ["a", "a"], {}, r"must be in \[0, 1\]"),
            ([1, 0], ["a", "b"], {"confidence": 1.0}, "confidence=1.0"),
            ([1, 0] * 50, range(100), {"resamples": 0}, "resamples=0"),
        ],
    )
    def test_bad_input_is_named(self, values, clusters, options, message):
        with pytest.raises(ValueError, match=message):
            clustered_mean(values, clusters, **options)


def requests(grades: dict[str, list[float | None]]) -> pd.DataFrame:
    rows = [(problem, i, grade) for problem, samples in grades.items() for i, grade in enumerate(samples)]
    return pd.DataFrame(rows, columns=["prompt_id", "sample_index", "grade"]).astype({"grade": float})


class TestDifference:
    def test_problems_are_joined_and_samples_averaged(self):
        a = requests({"x": [1, 0], "y": [1, 1], "z": [0]})
        b = requests({"z": [1], "y": [0], "x": [0]})
        interval = paired_difference(a, b)
        assert interval.value == pytest.approx((0.5 + 1 - 1) / 3)
        assert (interval.clusters, interval.samples) == (3, 8)
        reverse = paired_difference(b, a)
        assert (reverse.low, reverse.high) == pytest.approx((-interval.high, -interval.low))

    def test_pairs_make_it_narrow(self):
        random = np.random.default_rng(2)
        first = random.binomial(1, 0.5, size=400)
        second = np.where(random.random(400) < 0.05, 1 - first, first)
        a, b = (requests({str(i): [grade] for i, grade in enumerate(run)}) for run in (first, second))
        paired = paired_difference(a, b)
        alone = clustered_mean(first, range(400))
        assert paired.high - paired.low < (alone.high - alone.low) / 2
        assert paired == paired_difference(a, b.sample(frac=1, random_state=0))

    def test_equal_runs_are_not_certainly_equal(self):
        a = requests({str(i): [i % 2] for i in range(100)})
        interval = paired_difference(a, a)
        assert interval.value == 0
        assert interval.low == -interval.high
        assert 0.01 < interval.high < 0.05

    def test_one_problem(self):
        interval = paired_difference(requests({"a": [1, 1]}), requests({"a": [0, 1]}))
        assert interval.value == 0.5
        assert -1 <= interval.low < 0 < interval.high <= 1

    def test_mismatched_problems_are_counted(self):
        a, b = requests({"x": [1], "y": [1], "z": [1]}), requests({"x": [1], "w": [0]})
        with pytest.raises(ValueError, match="2 only in a, 1 only in b"):
            paired_difference(a, b)
        with pytest.raises(ValueError, match="1 only in a, 0 only in b"):
            paired_difference(requests({"x": [1], "y": [0]}), requests({"x": [1], "y": [None]}))
        with pytest.raises(ValueError, match="no sample is graded"):
            paired_difference(requests({"x": [None]}), requests({"x": [None]}))


class TestVerdict:
    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (-0.01, 0.03, "non-inferior"),
            (0.01, 0.03, "non-inferior"),
            (-0.015, -0.005, "non-inferior"),
            (-0.03, 0.01, "inconclusive"),
            (-0.03, -0.01, "inconclusive"),
            (-0.02, 0.01, "inconclusive"),
            (-0.03, -0.02, "inconclusive"),
            (-0.05, -0.025, "inferior"),
        ],
    )
    def test_follows_the_interval(self, low, high, verdict):
        assert non_inferiority(Interval((low + high) / 2, low, high, 100, 200), 0.02) == verdict

    @pytest.mark.parametrize("margin", [-0.02, 0, 1, math.nan])
    def test_margin_is_checked(self, margin):
        interval = Interval(0, -0.1, 0.1, 100, 200, 0.05)
        with pytest.raises(ValueError, match="margin="):
            non_inferiority(interval, margin)
        with pytest.raises(ValueError, match="margin="):
            power_warning(interval, margin)


class TestPower:
    def test_sentence_states_difference_and_problems(self):
        interval = Interval(0, -0.06, 0.06, 100, 200, standard_error=0.03)
        detectable = (1.959964 + 0.841621) * 0.03
        needed = math.ceil(100 * (detectable / 0.02) ** 2)
        sentence = power_warning(interval, 0.02)
        assert sentence.startswith("100 problems can't carry a margin of 2.0%")
        assert f"{detectable:.1%}" in sentence
        assert f"about {needed:,} problems" in sentence
        assert power_warning(interval, detectable - 1e-4) is not None
        assert power_warning(interval, detectable + 1e-4) is None
        assert power_warning(interval, detectable + 1e-4, power=0.9) is not None

    def test_holds_what_it_promises(self):
        """With as many problems as it asks for, equal runs are non-inferior in about 80 % of simulations."""
        random = np.random.default_rng(3)

        def intervals(problems: int, count: int) -> list[Interval]:
            draws = random.choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=(count, problems))
            return difference_intervals(draws, np.full(count, 2 * problems), resamples=FEWER)

        needed = power_warning(intervals(400, 1)[0], 0.04).split("about ")[1].split()[0]
        verdicts = [non_inferiority(interval, 0.04) for interval in intervals(int(needed.replace(",", "")), 500)]
        assert 0.73 <= verdicts.count("non-inferior") / 500 <= 0.87

    def test_needs_a_standard_error(self):
        with pytest.raises(ValueError, match="no standard error"):
            power_warning(Interval(0, -0.1, 0.1, 100, 200), 0.02)
        with pytest.raises(ValueError, match="power=2"):
            power_warning(Interval(0, -0.1, 0.1, 100, 200, 0.05), 0.02, power=2)


THOUGHT = np.random.default_rng(0).integers(0, 50_000, size=3_000).tolist()


class TestLoops:
    @pytest.mark.parametrize("period", [1, 2, 3, 7, 50, 127, 511, 512])
    @pytest.mark.parametrize("cut", [0, 1, 0.5])
    def test_loops_wherever_they_are_cut(self, period, cut):
        cycle = THOUGHT[:period]
        rest = cycle[: int(cut * period) if cut != 1 else 1]
        assert is_loop(THOUGHT + cycle * max(4, 64 // period + 1) + rest)

    @pytest.mark.parametrize("period", [1, 3, 20, 200, 512])
    def test_too_few_repetitions_are_none(self, period):
        cycle = THOUGHT[:period]
        shortest = max(64, 4 * period)
        looping = (cycle * shortest)[:shortest]
        assert is_loop([-1, *looping])
        assert not is_loop([-1, *looping[1:]])

    def test_a_changed_token_is_no_loop(self):
        cycle = THOUGHT[:20]
        looping = THOUGHT + cycle * 5
        assert is_loop(looping)
        for place in (-1, -30, -79):
            assert not is_loop([*looping[:place], -1, *looping[place:][1:]])
        counting = [token for i in range(50) for token in [*cycle, i]]
        assert not is_loop(counting), "a loop with a counter"

    def test_a_loop_that_was_left_is_none(self):
        assert not is_loop(THOUGHT + THOUGHT[:10] * 40 + THOUGHT[50:53])

    def test_long_cycles_are_none(self):
        assert not is_loop(THOUGHT[:513] * 6)
        assert is_loop(THOUGHT[:513] * 6, max_period=513)
        assert not is_loop(THOUGHT[:20] * 10, min_tokens=80, max_period=19)

    def test_short_outputs(self):
        for output in ([], [1], [1, 2] * 8, [1] * 63):
            assert not is_loop(output)
        assert is_loop([1] * 64)
        assert is_loop(np.ones(64, np.int32))

    def test_real_answers_are_none(self):
        answers = load_requests(ROOT / "results" / "records" / "demo")["output_token_ids"]
        assert loop_rate(answers) == 0
        assert loop_rate([*answers, [5] * 100, [5] * 100]) == pytest.approx(2 / 50)
        assert loop_rate([]) is None

    @pytest.mark.parametrize("options", [{"min_tokens": 1}, {"max_period": 0}, {"min_repeats": 1}])
    def test_numbers_are_checked(self, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            is_loop([1] * 100, **options)


@pytest.mark.parametrize("drawn", [1, 50, 1 << 18])
def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch, drawn):
    monkeypatch.setattr(bootstrap, "_DRAWN", drawn)
    random = np.random.default_rng(3)
    one_by_one = [np.bincount(random.integers(20, size=20), minlength=20) for _ in range(33)]
    assert (bootstrap._counts.__wrapped__(20, 33, 3) == one_by_one).all()
