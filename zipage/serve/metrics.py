"""/metrics for Prometheus: vLLM's names where the meaning is the same, `zipage:` where it is ours alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from zipage.outputs import FinishReason, RequestOutput, StreamEvent
from zipage.serve.engine import Engine
from zipage.serve.generation import Generation, Item
from zipage.stats import RequestMetrics

COUNTERS = {
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that were queued."),
    "vllm:generation_tokens": ("output_tokens", "Tokens generated."),
    "vllm:num_preemptions": ("preemptions", "Requests that gave up their blocks, to be computed again."),
    "zipage:cached_tokens": ("cached_tokens", "Prompt tokens whose KV was there already, of finished requests."),
    "zipage:compressions": ("compressions_applied", "Compressions applied."),
    "zipage:compressions_failed": ("compressions_failed", "Compressions that ended their request with an error."),
    "zipage:entries_evicted": ("entries_evicted", "KV entries evicted, per layer and KV head."),
    "zipage:entries_kept": ("entries_kept", "KV entries that compressions kept, per layer and KV head."),
    "zipage:blocks_returned": ("blocks_returned", "KV blocks that compressions gave back."),
    "zipage:budget_bound": ("budget_bound", "Samples that were compressed at least once."),
    "zipage:pauses": ("pauses", "Requests that were moved to host memory."),
    "zipage:resumes": ("resumes", "Requests that were moved back from host memory."),
    "zipage:bytes_to_host": ("bytes_to_host", "Of their blocks, of each rank."),
    "zipage:bytes_from_host": ("bytes_from_host", "Of blocks that were moved back, of each rank."),
    "zipage:requests_aborted": ("requests_aborted", "Prompts that were withdrawn, as when a client went away."),
    "zipage:requests_failed": ("requests_failed", "Prompts that ended with an error."),
}
"""Name -> field of `EngineStats`, and help."""
GAUGES = {
    "vllm:num_requests_running": ("num_running", "Samples that run."),
    "vllm:num_requests_waiting": ("num_waiting", "Samples that wait, paused ones among them."),
    "zipage:num_requests_compressing": ("num_compressing", "Samples that sit out for a compression under way."),
    "zipage:query_slots_used": ("query_slots_used", "Query slots held."),
    "zipage:kv_blocks_used": ("blocks_used", "KV blocks in use."),
    "zipage:kv_blocks_total": ("blocks_total", "KV blocks in the pool."),
    "zipage:sliding_blocks_used": ("sliding_blocks_used", "Blocks of sliding layers in use."),
    "zipage:sliding_blocks_total": ("sliding_blocks_total", "Blocks of sliding layers in their pool."),
}
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 300)
LONG = (0.3, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 240, 480, 960, 1920)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """Observes what generations get, and reads the engine's counters when it is asked."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model, "engine": "0"}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._seen: dict[tuple[str, int], float] = {}
        """When the last token of each unfinished streamed sample came."""
        histogram = self._histogram
        self._ttft = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self._itl = histogram("vllm:inter_token_latency_seconds", "Between tokens of streamed requests.", SECONDS)
        self._tpot = histogram("vllm:request_time_per_output_token_seconds", "Mean of a sample.", SECONDS)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", LONG)
        self._queued = histogram("vllm:request_queue_time_seconds", "From arrival to the first step.", LONG)
        self._prompt = histogram("vllm:request_prompt_tokens", "Length of prompts.", TOKENS)
        self._output = histogram("vllm:request_generation_tokens", "Length of samples.", TOKENS)
        names = [*self._labels, "finished_reason"]
        self._ended = Counter("vllm:request_success", "Samples that ended.", names, registry=self._registry)
        engine.observers.append(self.observe)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, list(self._labels), buckets=buckets, registry=self._registry)
        return histogram.labels(**self._labels)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's counters and gauges, as of its last step."""
        stats, labels, values = self._engine.view.stats, list(self._labels), list(self._labels.values())
        for kind, metrics in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for name, (field, text) in metrics.items():
                metric = kind(name, text, labels=labels)
                metric.add_metric(values, getattr(stats, field))
                yield metric
        share = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", labels=labels)
        share.add_metric(values, stats.blocks_used / max(1, stats.blocks_total))
        yield share

    def observe(self, generation: Generation, item: Item) -> None:
        if isinstance(item, StreamEvent):
            self._observe_event(generation, item)
        elif isinstance(item, RequestOutput):
            for sample in item.outputs:
                self._observe_end(generation, sample.finish_reason, sample.metrics)

    def _observe_event(self, generation: Generation, event: StreamEvent) -> None:
        key, now = (event.request_id, event.index), time.perf_counter()
        if event.token_id is not None:
            if (before := self._seen.get(key)) is not None:
                self._itl.observe(now - before)
            self._seen[key] = now
        if event.finish_reason is not None:
            self._seen.pop(key, None)
            self._observe_end(generation, event.finish_reason, event.metrics)

    def _observe_end(self, generation: Generation, reason: FinishReason, metrics: RequestMetrics) -> None:
        self._ended.labels(**self._labels, finished_reason=reason).inc()
        before = metrics.arrival - generation.arrival  # its prompt was tokenized, and the step under way ended
        values = (
            (self._ttft, metrics.ttft, before),
            (self._tpot, metrics.tpot, 0),
            (self._e2e, metrics.e2e, before),
            (self._queued, metrics.queued, before),
            (self._prompt, metrics.prompt_tokens, 0),
            (self._output, metrics.output_tokens, 0),
        )
        for histogram, value, more in values:
            if value is not None:
                histogram.observe(value + more)
