"""From streams to the figures of a row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.serving.stream import Stream

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
LATE = 0.020
"""Seconds of the client's own lateness (p99) from which on a row says that the client was late."""
MOST_FAILED = 0.01
"""Share of failed requests above which no limit holds: a p99 that leaves them out would mean nothing."""


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that this share does not exceed; of sorted values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def quantiles(values: Iterable[float | None]) -> dict[str, float] | None:
    ordered = sorted(value for value in values if value is not None)
    return {name: quantile(ordered, share) for name, share in QUANTILES.items()} if ordered else None


def keeps(stream: Stream, slo: Mapping[str, float]) -> bool:
    """Whether a request kept each limit while it was watched: on its own TTFT, the p99 of its ITL, its TPOT and E2E."""
    if stream.outcome == "failed" or stream.first is None:
        return False
    gaps = sorted(stream.gaps)
    own = {"ttft": stream.ttft, "itl": quantile(gaps, 0.99) if gaps else None, "tpot": stream.tpot, "e2e": stream.e2e}
    return all(own[name] is None or own[name] <= limit for name, limit in slo.items())


def figures(streams: Sequence[Stream], seconds: float, slo: Mapping[str, float]) -> dict[str, Any]:
    """Of the requests that are measured, all of which have an outcome.

    "good" are the requests that were answered and kept the limits; "kept" is the share of those that kept them as long
    as they were watched, aborted ones included. A request that was aborted before its first token has waited for as
    long as it was there, which is a lower bound of its TTFT and counts as it. Failed requests have no times.

    Args:
        seconds: that they are spread over.
        slo: limits in seconds, by "ttft", "itl", "tpot" or "e2e".
    """
    outcomes = Counter(stream.outcome for stream in streams)
    heard = [stream for stream in streams if stream.outcome != "failed"]
    done = [stream for stream in streams if stream.outcome == "finished"]
    times = {
        "ttft": quantiles(stream.end - stream.due if stream.first is None else stream.ttft for stream in heard),
        "itl": quantiles(gap for stream in heard for gap in stream.gaps),
        "tpot": quantiles(stream.tpot for stream in done),
        "e2e": quantiles(stream.e2e for stream in done),
    }
    kept = [stream for stream in streams if keeps(stream, slo)]
    good = sum(stream.outcome == "finished" for stream in kept)
    holds = outcomes["failed"] <= MOST_FAILED * len(streams) and all(
        times[name] is not None and times[name]["p99"] <= limit for name, limit in slo.items()
    )
    errors = Counter(stream.error for stream in streams if stream.outcome == "failed")
    return times | {
        "sent": len(streams),
        "finished": outcomes["finished"],
        "failed": outcomes["failed"],
        "aborted": outcomes["aborted"],
        "short": sum(stream.tokens < stream.asked for stream in done),
        "error": next((error for error, _ in errors.most_common(1)), None),
        "good": good,
        "kept": len(kept) / len(streams) if streams else None,
        "goodput": good / seconds if seconds else 0.0,
        "slo_holds": bool(streams) and holds,
        "tokens_per_second_user": 1 / times["tpot"]["p50"] if times["tpot"] and times["tpot"]["p50"] else None,
    }


def lateness(streams: Iterable[Stream], lags: Sequence[float]) -> dict[str, Any]:
    """How late the client itself was: at sending, and at coming round to its own clock.

    Args:
        lags: seconds by which a task of the client woke up too late.
    """
    late = quantiles(stream.sent - stream.due for stream in streams if stream.sent is not None)
    lag = quantiles(lags)
    worst = max(times["p99"] for times in (late, lag, {"p99": 0.0}) if times is not None)
    return {"late": late, "lag": lag, "client_late": worst > LATE}
