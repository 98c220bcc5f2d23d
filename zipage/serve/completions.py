"""/v1/completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from zipage.engine.input_processor import Tokens
from zipage.llm import LLM
from zipage.outputs import CompletionOutput, FinishReason, StreamEvent
from zipage.serve import logprobs
from zipage.serve.generation import Generation
from zipage.serve.schemas import CompletionRequest

KIND = "text_completion"
PREFIX = "cmpl"

REASONS = {"capacity": "length"}


def finish_reason(reason: FinishReason | None) -> str | None:
    """In OpenAI's words, which have none for a pool that is too small."""
    return REASONS.get(reason, reason)


def readers(body: CompletionRequest, llm: LLM, chat_template: str | None) -> list[Callable[[], Tokens]]:
    """What tokenizes each prompt."""
    return [lambda prompt=prompt: llm.tokenize(prompt) for prompt in body.prompts()]


def choice(body: CompletionRequest, generation: Generation, index: int, sample: CompletionOutput) -> dict[str, Any]:
    scores = None if sample.logprobs is None else logprobs.of_completion(sample.logprobs, body.logprobs)
    return {
        "index": index,
        "text": sample.text,
        "logprobs": scores,
        "finish_reason": finish_reason(sample.finish_reason),
        "stop_reason": sample.stop_reason,
    }


class Chunks:
    """The choice of each event's chunk."""

    kind = KIND

    def __init__(self, body: CompletionRequest, generation: Generation) -> None:
        self._generation = generation
        self._num_top = body.logprobs
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def __call__(self, event: StreamEvent) -> list[dict[str, Any]]:
        _, index = self._generation.choice(event)
        scores = None
        if event.logprobs is not None:
            scores = logprobs.of_completion([event.logprobs], self._num_top, self._offsets[index])
            self._offsets[index] += len(scores["tokens"][0])
        return [
            {
                "index": index,
                "text": event.text,
                "logprobs": scores,
                "finish_reason": finish_reason(event.finish_reason),
                "stop_reason": event.stop_reason,
            }
        ]
