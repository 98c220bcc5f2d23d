"""The numbers that sum up a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.analysis import fidelity
from experiments.analysis.loops import loop_rate
from experiments.analysis.replicas import at_once
from experiments.records.files import OF_ENDED

PERCENTILES = (50, 90, 99)
WINDOWS = 10
"""Parts of the window of a steady state, each a measurement of its throughput."""
DISTANCES = (0, 500, 1000, 2000, 4000)
"""Tokens at which a group of recalls begins; each ends before the next."""


def summarise(
    requests: Sequence[dict[str, Any]],
    steps: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
    *,
    seconds: float,
    evicts: bool,
    memory: Mapping[str, Any] | None = None,
    timed: bool = True,
) -> dict[str, Any]:
    """Accuracy, throughput and latency of a run, and how far its budget bound it.

    Args:
        requests: rows of `requests.parquet`.
        steps: rows of `steps.parquet`, in order of time.
        events: rows of `events.parquet`.
        seconds: from the first arrival to the end of the last request.
        evicts: whether the policy can evict at all.
        memory: the engine's memory plan; None where it tells none.
        timed: whether requests arrived by a clock; otherwise no rate was offered.

    Returns:
        `accuracy` is the mean grade over all samples, refused prompts included (pass@1; None where nothing is graded),
        `place_accuracy` that of the answered samples at each place of a chain of questions (None for single questions),
        `recall_accuracy` that of the recalls of conversations, `recall_by_distance` what `recalls_by_distance` makes of
        them, and `unanswered_turns` the turns for which the context had no room (None where there is no conversation).
        `facts_known` is the share of the facts that problems name and answers knew (None where they name none).
        `fidelity` is what `experiments.analysis.fidelity` says of runs with that scenario, None of others.
        Times are in seconds; a figure that no sample gives is None. `budget_bound_share` is the share of the answered
        samples that were compressed (None where the policy never evicts); `budget_never_bound` says that the policy
        evicts and none was, so that the run equals full KV. `entries_evicted` are per layer and KV head. `loop_rate` is
        the share of the answered samples that end in a loop. `itl` is the time between two tokens of a sample, over all
        tokens: the time from one engine step to the next, counted once for each sample that decodes in it.
        `rate` is in requests a second: `offered` as they arrived (`offered_rate`), `achieved` as they were answered,
        over all the `seconds`.
        `blocks_held` is the most blocks that an answered sample held at once, as the engine counted them, and
        `kv_bytes` what these took in bytes: keys and values with scores and positions, those of sliding layers, and its
        query slot if it held one. With several replicas `steps` counts those of all, `itl` is between the steps of
        each, and the peaks are of all at once.
    """
    answered = [row for row in requests if row.get("error") is None]
    compressed = sum(bool(row.get("compressions")) for row in answered)
    output_tokens = sum(row["output_tokens"] for row in requests)
    prompt_tokens = sum(row["prompt_tokens"] for row in requests if row["sample_index"] == 0)
    return {
        "accuracy": accuracy([row["grade"] for row in requests]),
        "place_accuracy": place_accuracy([row.get("place_grades") for row in requests]),
        "recall_accuracy": accuracy([grade for row in requests for grade in row.get("recall_grades") or ()]),
        "recall_by_distance": recalls_by_distance(requests),
        "unanswered_turns": unanswered_turns(answered),
        "fidelity": fidelity.summary(requests),
        "facts_known": accuracy([known for row in requests for known in row.get("facts_known") or ()]),
        "prompts": len({row["prompt_id"] for row in requests}),
        "samples": len(requests),
        "errors": sum(row.get("error") is not None for row in requests),
        "grader_errors": sum(row.get("grader_error") is not None for row in requests),
        "finish_reasons": dict(Counter(row["finish_reason"] for row in requests)),
        "seconds": seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / seconds,
        "requests_per_second": len(requests) / seconds,
        "rate": {
            "offered": offered_rate(requests) if timed else None,
            "achieved": len({row["prompt_id"] for row in answered}) / seconds,
        },
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "cached_tokens": sum(row.get("cached_tokens") or 0 for row in requests),
        "preemptions": sum(row.get("preemptions") or 0 for row in requests),
        "pauses": sum(row.get("pauses") or 0 for row in requests),
        "compressions": sum(row.get("compressions") or 0 for row in requests),
        "budget_bound_share": compressed / len(answered) if evicts and answered else None,
        "budget_never_bound": evicts and not compressed,
        "entries_evicted": _evicted(events),
        "loop_rate": loop_rate([row.get("output_token_ids", ()) for row in answered]),
        "output_length": spread([row["output_tokens"] for row in answered]),
        "ttft": spread([row.get("ttft") for row in requests]),
        "tpot": spread([row.get("tpot") for row in requests]),
        "e2e": spread([row.get("e2e") for row in requests]),
        "itl": inter_token_latency(steps),
        "blocks_held": spread([row.get("peak_blocks") for row in answered]),
        "kv_bytes": spread([cache_bytes(row, memory) for row in answered]),
        "steps": len(steps),
        "peak_blocks": peak(steps, "blocks_used"),
        "peak_running": peak(steps, "num_running"),
        "peak_query_slots": peak(steps, "query_slots_used"),
    }


def in_window(
    steps: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], window: tuple[float, float], *, evicts: bool
) -> dict[str, Any]:
    """Those figures of `summarise` that tell of a steady state by its steps, of the window in which it was timed.

    Args:
        steps, events: rows of the whole run.
        window: its begin and end, in seconds after the start.

    Returns:
        Also `window_rates`: tokens a second in each of `WINDOWS` equal parts of the window. What only requests that
        ended could tell is None: most are still at work, and those that ended are the short ones. Output tokens are
        those of decodes: the first token of a request, which its prefill gives, does not count.
    """
    begin, end = window
    steps = [step for step in steps if begin < step["time"] <= end]
    events = [event for event in events if begin < event["time"] <= end]
    decoded = np.array([step["num_decode"] for step in steps], dtype=np.float64)
    parts, _ = np.histogram([step["time"] for step in steps], WINDOWS, window, weights=decoded)
    compressions = sum(event["kind"] == "compress" for event in events)
    prefilled, seconds = sum(step["prefill_tokens"] for step in steps), end - begin
    return {
        "seconds": seconds,
        "output_tokens": int(decoded.sum()),
        "output_tokens_per_second": decoded.sum() / seconds,
        "total_tokens_per_second": (prefilled + decoded.sum()) / seconds,
        "window_rates": (parts * WINDOWS / seconds).tolist(),
        "requests_per_second": None,
        "rate": {"offered": None, "achieved": None},
        **dict.fromkeys(OF_ENDED, spread([])),
        "prompt_tokens": prefilled,
        "preemptions": sum(step["num_preempted"] for step in steps),
        "pauses": sum(step["num_paused"] for step in steps),
        "compressions": compressions,
        "budget_bound_share": None,
        "budget_never_bound": evicts and not compressions,
        "entries_evicted": _evicted(events),
        "itl": inter_token_latency(steps),
        "steps": len(steps),
        "peak_blocks": peak(steps, "blocks_used"),
        "peak_running": peak(steps, "num_running"),
        "peak_query_slots": peak(steps, "query_slots_used"),
    }


def _evicted(events: Sequence[dict[str, Any]]) -> int:
    return sum(event["entries_before"] - event["entries_after"] for event in events if event["kind"] == "compress")


def offered_rate(requests: Sequence[Mapping[str, Any]]) -> float | None:
    """Requests a second between the first arrival and the last; None where all came at once."""
    due = {row["prompt_id"]: row["arrival"] for row in requests if row.get("arrival") is not None}.values()
    span = max(due, default=0.0) - min(due, default=0.0)
    return (len(due) - 1) / span if span > 0 else None


def peak(steps: Sequence[dict[str, Any]], gauge: str) -> int:
    """The most that steps tell of a gauge, over all replicas at once."""
    if not steps:
        return 0
    return int(at_once([step.get("replica", 0) for step in steps], [step[gauge] for step in steps]).max())


def inter_token_latency(steps: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """`spread` of the seconds between the steps of a replica, each weighted by the samples that decode in it."""
    of_replica: dict[int, list[dict[str, Any]]] = {}
    for step in steps:
        of_replica.setdefault(step.get("replica", 0), []).append(step)
    pairs = [
        (step["time"] - before["time"], step["num_decode"])
        for own in of_replica.values()
        for before, step in pairwise(own)
        if step["num_decode"]
    ]
    if not pairs:
        return spread([])
    gaps, weights = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    order = gaps.argsort()
    reached = weights[order].cumsum() / weights.sum()
    percentiles = {f"p{p}": float(gaps[order][np.searchsorted(reached, p / 100 - 1e-12)]) for p in PERCENTILES}
    return {"mean": float(np.average(gaps, weights=weights))} | percentiles | {"max": float(gaps.max())}


def cache_bytes(row: Mapping[str, Any], memory: Mapping[str, Any] | None) -> int | None:
    """The most bytes that the cache of a sample held at once; None where the engine does not tell."""
    blocks = row.get("peak_blocks")
    if blocks is None or memory is None or "block_bytes" not in memory:
        return None
    sliding = (row.get("peak_sliding_blocks") or 0) * memory.get("sliding_block_bytes", 0)
    return blocks * memory["block_bytes"] + sliding + bool(row.get("query_slot")) * memory["query_slot_bytes"]


def place_accuracy(grades: Sequence[Sequence[float] | None]) -> list[float] | None:
    """The mean grade at each place of chains of one length; None where no sample has such grades."""
    graded = [row for row in grades if row is not None]
    return np.mean(graded, axis=0).tolist() if graded else None


def recalls_by_distance(requests: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int | None]] | None:
    """Accuracy and number of the answered recalls in each group of `DISTANCES`; None where there is no recall."""
    recalls = [
        (distance, grade)
        for row in requests
        for distance, grade in zip(row.get("recall_distances") or (), row.get("recall_grades") or (), strict=False)
        if distance is not None
    ]
    if not recalls:
        return None
    groups = {}
    for begin, end in zip(DISTANCES, [*DISTANCES[1:], math.inf], strict=True):
        grades = [grade for distance, grade in recalls if begin <= distance < end]
        name = f"{begin}+" if end == math.inf else f"{begin}-{end}"
        groups[name] = {"accuracy": accuracy(grades), "count": len(grades)}
    return groups


def unanswered_turns(answered: Sequence[Mapping[str, Any]]) -> int | None:
    """Turns of conversations that have no answer; None where no sample is a graded conversation."""
    asked = [
        len(row["place_grades"]) + len(row.get("recall_grades") or ()) - len(row["answer_tokens"])
        for row in answered
        if row.get("answer_tokens") is not None and row.get("place_grades") is not None
    ]
    return sum(asked) if asked else None


def accuracy(grades: Sequence[float | None]) -> float | None:
    """The mean of the grades that are there; None where there is none."""
    present = [grade for grade in grades if grade is not None]
    return sum(present) / len(present) if present else None


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, percentiles and maximum of the values that are there; None where there is none."""
    present = np.array([value for value in values if value is not None], dtype=np.float64)
    if not present.size:
        return dict.fromkeys(("mean", *(f"p{p}" for p in PERCENTILES), "max"))
    percentiles = {
        f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(present, PERCENTILES), strict=True)
    }
    return {"mean": float(present.mean())} | percentiles | {"max": float(present.max())}
