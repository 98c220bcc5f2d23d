"""What becomes of streams: quantiles, goodput, whether limits hold, and how late the client was."""

import pytest

from experiments.serving.figures import figures, lateness, quantile
from experiments.serving.stream import Stream

SLO = {"ttft": 2.0, "itl": 0.05}


def stream(ttft: float | None, gap: float = 0.02, tokens: int = 11, outcome: str = "finished", sent: float = 100.0):
    """Due at 100; at 110 it has ended."""
    one = Stream(b"", 100.0, 11)
    one.outcome, one.sent, one.end = outcome, sent, 110.0
    if ttft is not None:
        one.first, one.events = 100.0 + ttft, tokens
        one.gaps.extend([gap] * (tokens - 1))
        one.last = one.first + gap * (tokens - 1)
    return one


def test_a_quantile_is_a_value_that_was_seen():
    values = sorted(range(1, 101))
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0), quantile([7], 0.5)) == (
        50,
        99,
        100,
        7,
    )


def test_figures_of_a_rate():
    streams = [stream(0.1 * i) for i in range(1, 11)]
    row = figures(streams, 5.0, SLO)
    assert row["ttft"] == pytest.approx({"p50": 0.5, "p90": 0.9, "p99": 1.0})
    assert row["itl"] == pytest.approx({"p50": 0.02, "p90": 0.02, "p99": 0.02})
    assert row["tpot"]["p50"] == pytest.approx(0.02)
    assert row["e2e"]["p99"] == pytest.approx(1.2)
    assert (row["sent"], row["finished"], row["failed"], row["aborted"], row["short"]) == (10, 10, 0, 0, 0)
    assert row["goodput"] == 2.0
    assert row["slo_holds"]
    assert row["tokens_per_second_user"] == pytest.approx(50)


def test_a_request_is_in_time_if_it_kept_each_limit():
    slow, stalled = stream(2.5), stream(0.1)
    stalled.gaps[4] = 0.3
    streams = [stream(0.1), slow, stalled, stream(0.1, outcome="aborted"), stream(None, outcome="failed")]
    row = figures(streams, 10.0, SLO)
    assert (row["good"], row["kept"]) == (1, 0.4), "one that was aborted kept them as long as it was watched"
    assert figures(streams, 10.0, SLO | {"tpot": 0.01})["good"] == 0
    assert figures(streams, 10.0, {})["good"] == 3


def test_limits_are_on_the_99th_percentile():
    fast = [stream(0.1) for _ in range(99)]
    assert figures([*fast, stream(30.0)], 1.0, SLO)["slo_holds"]
    assert not figures([*fast[1:], stream(30.0), stream(30.0)], 1.0, SLO)["slo_holds"]


def test_who_never_got_a_token_has_waited_all_the_time():
    row = figures([stream(0.1), stream(None, outcome="aborted")], 1.0, SLO)
    assert row["ttft"]["p99"] == 10.0
    assert not row["slo_holds"]


def test_failures_are_no_fast_answers():
    bad = stream(None, outcome="failed")
    bad.error = "status 429: full"
    row = figures([*(stream(0.1) for _ in range(50)), bad], 1.0, SLO)
    assert not row["slo_holds"], "2 % failed"
    assert (row["failed"], row["error"]) == (1, "status 429: full")
    assert not figures([], 1.0, SLO)["slo_holds"]


def test_a_short_answer_is_counted():
    assert figures([stream(0.1, tokens=5)], 1.0, SLO)["short"] == 1


def test_the_clients_own_lateness():
    punctual = [stream(0.1, sent=100.001) for _ in range(100)]
    assert not lateness(punctual, [0.001] * 100)["client_late"]
    assert lateness([stream(0.1, sent=100.03) for _ in range(3)], [])["client_late"]
    assert lateness(punctual, [0.03] * 3)["client_late"]
    assert lateness([], []) == {"late": None, "lag": None, "client_late": False}
