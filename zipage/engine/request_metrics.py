"""The metrics of a finished request."""

from __future__ import annotations

from dataclasses import replace

from zipage.scheduling.request import Request
from zipage.stats import RequestMetrics


def request_metrics(request: Request) -> RequestMetrics:
    """The record of one finished sample."""
    num_output = request.num_output_tokens
    first, last = request.first_token_time, request.finish_time
    metrics = RequestMetrics(
        arrival=request.arrival,
        prompt_tokens=request.num_prompt_tokens,
        output_tokens=num_output,
        cached_tokens=request.cached_tokens,
        preemptions=request.num_preemptions,
        pauses=request.num_pauses,
        compressions=request.num_compressions,
        peak_blocks=request.peak_blocks,
        peak_sliding_blocks=request.peak_sliding_blocks,
        query_slot=request.has_held_slot,
    )
    if request.first_scheduled is not None:
        metrics.queued = request.first_scheduled - request.arrival
    if first is not None:
        metrics.ttft = first - request.arrival
    if num_output > 1:
        metrics.tpot = (last - first) / (num_output - 1)
    metrics.e2e = last - request.arrival
    return metrics


def cut_short(metrics: RequestMetrics, num_output: int) -> RequestMetrics:
    """The record of a sample of which only the first `num_output` tokens, at least one, are wanted."""
    tpot = (metrics.e2e - metrics.ttft) / (num_output - 1) if num_output > 1 else None
    return replace(metrics, output_tokens=num_output, tpot=tpot)
