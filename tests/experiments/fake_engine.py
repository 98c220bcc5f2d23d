"""An engine without a model: the face of `zipage.LLM` and made-up answers that depend on the prompt alone."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from zipage import (
    CompletionOutput,
    EngineConfig,
    EngineStats,
    EventStats,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    StepStats,
)


class FakeTokenizer:
    """One token a character."""

    chat_template = "{{ messages }}{{ thinking }}"

    def apply_chat_template(self, messages, chat_template, tokenize, add_generation_prompt, **options) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "".join(options) + "<assistant>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


@dataclass
class FakePlan:
    num_blocks: int = 100


@dataclass
class _Sample:
    """An answer, and the entries its cache holds."""

    text: str
    held: int
    compressions: int = 0


@dataclass
class _Running:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    samples: list[_Sample]
    made: int = 0


@dataclass
class FakeLLM:
    """One token a step for each of the first `max_num_seqs` samples; `fail_at` raises in that step, `step_seconds`
    slows each down.

    Under a policy other than "full", a sample that holds its budget and one block more is compressed.
    """

    options: dict[str, Any]
    fail_at: int | None = None
    error: Exception = field(default_factory=lambda: RuntimeError("the device\nis gone"))
    step_seconds: float = 0.0
    max_prompt: int = 10_000

    def __post_init__(self) -> None:
        self.config = EngineConfig.from_kwargs(**self.options)
        self.step_listeners: list[Callable[[StepStats], None]] = []
        self.event_listeners: list[Callable[[EventStats], None]] = []
        self.memory_plan = FakePlan()
        self.stats = EngineStats()
        self._running: list[_Running] = []

    def get_tokenizer(self) -> FakeTokenizer:
        return FakeTokenizer()

    def add_request(self, prompt: list[int], params: SamplingParams, request_id: str) -> str:
        if len(prompt) > self.max_prompt:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the pool holds {self.max_prompt}")
        numbers = [zlib.crc32(repr((prompt, index * bool(params.temperature))).encode()) for index in range(params.n)]
        texts = [f"So it goes.\nThe answer is {number % 40}."[: params.max_tokens] for number in numbers]
        metrics = RequestMetrics(arrival=time.perf_counter(), prompt_tokens=len(prompt))
        samples = [_Sample(text, held=len(prompt)) for text in texts]
        self._running.append(_Running(request_id, prompt, params, metrics, samples))
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self._running)

    def step(self) -> list[RequestOutput]:
        time.sleep(self.step_seconds)
        if self.stats.steps == self.fail_at:
            raise self.error
        now = time.perf_counter()
        at_work = self._at_work()
        for request in at_work:
            request.made += 1
            request.metrics.ttft = request.metrics.ttft or now - request.metrics.arrival
            for index, sample in enumerate(request.samples):
                sample.held += request.made <= len(sample.text)
                if self.config.policy != "full" and sample.held >= self._keep + self.config.block_size:
                    self._compress(request, index)
        done = [request for request in at_work if request.made == max(len(s.text) for s in request.samples)]
        self._running = [request for request in self._running if request not in done]
        running = len(at_work) - len(done)
        step = StepStats(
            step=self.stats.steps,
            time=now,
            num_decode=running,
            num_prefill=0,
            prefill_tokens=0,
            num_preempted=0,
            num_paused=0,
            num_resumed=0,
            num_compressed=0,
            num_compressing=0,
            num_stalled=0,
            num_running=running,
            num_waiting=sum(r.params.n for r in self._running) - sum(r.params.n for r in self._at_work()),
            query_slots_used=running * (self.config.policy != "full"),
            blocks_used=running + 1,
            blocks_cached=0,
            blocks_total=100,
            host_time=0.0,
            device_time=0.0,
            step_time=0.001,
        )
        self.stats.steps += 1
        for listener in self.step_listeners:
            listener(step)
        return [_output(request, now) for request in done]

    def _at_work(self) -> list[_Running]:
        places = accumulate(request.params.n for request in self._running)
        return [r for r, place in zip(self._running, places, strict=True) if place <= self.config.max_num_seqs]

    @property
    def _keep(self) -> int:
        """The budget in whole blocks."""
        size = self.config.block_size
        return -(-self.config.budget_tokens // size) * size

    def _compress(self, request: _Running, index: int) -> None:
        """Two layers of three heads keep the latest entries."""
        sample, size, keep = request.samples[index], self.config.block_size, self._keep
        num_tokens = len(request.prompt) + request.made
        latest = np.arange(num_tokens - keep, num_tokens, dtype=np.int32)
        event = EventStats(
            kind="compress",
            step=self.stats.steps,
            time=time.perf_counter(),
            request_id=request.request_id,
            sample_index=index,
            round=sample.compressions,
            num_tokens=num_tokens,
            entries_before=sample.held,
            entries_after=keep,
            blocks_before=-(-sample.held // size),
            blocks_after=keep // size,
            seconds=0.001,
            kept_positions=np.tile(latest, (2, 3, 1)) if self.config.trace_positions else None,
        )
        sample.held = keep
        sample.compressions += 1
        for listener in self.event_listeners:
            listener(event)


def _output(request: _Running, now: float) -> RequestOutput:
    request.metrics.e2e = now - request.metrics.arrival
    request.metrics.tpot = 0.001
    samples = []
    for index, sample in enumerate(request.samples):
        text = sample.text
        metrics = RequestMetrics(**{name: getattr(request.metrics, name) for name in RequestMetrics.__slots__})
        metrics.output_tokens = len(text)
        metrics.compressions = sample.compressions
        reason = "length" if len(text) == request.params.max_tokens else "stop"
        samples.append(CompletionOutput(index, text, [ord(c) for c in text], reason, metrics=metrics))
    return RequestOutput(request.request_id, None, request.prompt, samples, request.metrics)


def fake_backend(**behaviour: Any) -> dict[str, Callable[..., FakeLLM]]:
    """A table of backends for `experiments.run.main`."""
    return {"zipage": lambda **options: FakeLLM(options, **behaviour)}
