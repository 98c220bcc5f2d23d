"""An engine without a model: the face of `zipage.LLM` and made-up answers that depend on the prompt alone."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zipage import CompletionOutput, EngineConfig, EngineStats, RequestMetrics, RequestOutput, SamplingParams, StepStats


class FakeTokenizer:
    """One token a character."""

    chat_template = "{{ messages }}"

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
class _Running:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    texts: list[str]
    made: int = 0


@dataclass
class FakeLLM:
    """One token a step for every request; `fail_at` raises in that step, `step_seconds` slows each down."""

    options: dict[str, Any]
    fail_at: int | None = None
    error: Exception = field(default_factory=lambda: RuntimeError("the device\nis gone"))
    step_seconds: float = 0.0
    max_prompt: int = 10_000

    def __post_init__(self) -> None:
        self.config = EngineConfig.from_kwargs(**self.options)
        self.step_listeners: list[Callable[[StepStats], None]] = []
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
        self._running.append(_Running(request_id, prompt, params, metrics, texts))
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self._running)

    def step(self) -> list[RequestOutput]:
        time.sleep(self.step_seconds)
        if self.stats.steps == self.fail_at:
            raise self.error
        now = time.perf_counter()
        for request in self._running:
            request.made += 1
            request.metrics.ttft = request.metrics.ttft or now - request.metrics.arrival
        done = [request for request in self._running if request.made == max(map(len, request.texts))]
        self._running = [request for request in self._running if request not in done]
        running = len(self._running)
        step = StepStats(self.stats.steps, now, running, 0, 0, 0, running, 0, running + 1, 0, 100, 0.0, 0.0, 0.001)
        self.stats.steps += 1
        for listener in self.step_listeners:
            listener(step)
        return [_output(request, now) for request in done]


def _output(request: _Running, now: float) -> RequestOutput:
    request.metrics.e2e = now - request.metrics.arrival
    request.metrics.tpot = 0.001
    samples = []
    for index, text in enumerate(request.texts):
        metrics = RequestMetrics(**{name: getattr(request.metrics, name) for name in RequestMetrics.__slots__})
        metrics.output_tokens = len(text)
        reason = "length" if len(text) == request.params.max_tokens else "stop"
        samples.append(CompletionOutput(index, text, [ord(c) for c in text], reason, metrics=metrics))
    return RequestOutput(request.request_id, None, request.prompt, samples, request.metrics)


def fake_backend(**behaviour: Any) -> dict[str, Callable[..., FakeLLM]]:
    """A table of backends for `experiments.run.main`."""
    return {"zipage": lambda **options: FakeLLM(options, **behaviour)}
