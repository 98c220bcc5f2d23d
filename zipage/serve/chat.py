"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zipage.engine.input_processor import Tokens
from zipage.llm import LLM
from zipage.outputs import CompletionOutput, StreamEvent
from zipage.serve import logprobs
from zipage.serve.completions import finish_reason
from zipage.serve.generation import Generation
from zipage.serve.reasoning import Splitter, template_of
from zipage.serve.schemas import ChatRequest, template_options

KIND = "chat.completion"
PREFIX = "chatcmpl"


def readers(body: ChatRequest, llm: LLM, chat_template: str | None) -> list[Callable[[], Tokens]]:
    """What puts the messages through the template and tokenizes them."""
    options = template_options(body, template_of(llm, chat_template))
    return [lambda: llm.tokenize_chat(body.messages, chat_template=chat_template, **options)]


def choice(body: ChatRequest, generation: Generation, index: int, sample: CompletionOutput) -> dict[str, Any]:
    reasoning, content = "", sample.text
    if generation.splits_reasoning:
        reasoning, content = Splitter(generation.prompts[0].text).add(sample.text, is_last=True)
    message = {"role": "assistant", "content": content}
    if reasoning:
        message |= {"content": content or None, "reasoning_content": reasoning}
    scores = None if sample.logprobs is None else logprobs.of_chat(sample.logprobs, body.top_logprobs or 0)
    return {
        "index": index,
        "message": message,
        "logprobs": scores,
        "finish_reason": finish_reason(sample.finish_reason),
        "stop_reason": sample.stop_reason,
    }


class Chunks:
    """The choices of each event's chunks: a sample's first has its role before it."""

    kind = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, generation: Generation) -> None:
        self._num_top = body.top_logprobs or 0
        self._splits = generation.splits_reasoning
        self._prompt = generation.prompts[0].text
        self._samples: dict[int, Splitter | None] = {}

    def __call__(self, event: StreamEvent) -> list[dict[str, Any]]:
        choices = []
        if event.index not in self._samples:
            self._samples[event.index] = Splitter(self._prompt) if self._splits else None
            choices.append(_choice(event.index, {"role": "assistant", "content": ""}))
        reason = finish_reason(event.finish_reason)
        splitter, delta = self._samples[event.index], {"content": event.text}
        if splitter is not None:
            reasoning, content = splitter.add(event.text, is_last=reason is not None)
            delta = {"reasoning_content": reasoning} if reasoning else {"content": content}
            if reasoning and content:
                choices.append(_choice(event.index, delta))
                delta = {"content": content}
        scores = None if event.logprobs is None else logprobs.of_chat([event.logprobs], self._num_top)
        choices.append(_choice(event.index, delta, scores, reason) | {"stop_reason": event.stop_reason})
        return choices


def _choice(
    index: int, delta: dict[str, str], scores: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": scores, "finish_reason": reason}
