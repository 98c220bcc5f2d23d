"""How many tokens a request took, in OpenAI's format."""

from __future__ import annotations

from typing import Any

from zipage.outputs import RequestOutput, StreamEvent
from zipage.serve.generation import Generation


class Usage:
    """Counts the tokens of a generation as they come."""

    def __init__(self, generation: Generation) -> None:
        self._prompt = generation.prompt_tokens
        self._completion = 0
        self._cached = 0

    def count(self, event: StreamEvent) -> None:
        self._completion += event.token_id is not None
        if event.metrics is not None and event.index == 0:
            self._cached += event.metrics.cached_tokens

    def count_all(self, output: RequestOutput) -> None:
        self._completion += sum(len(sample.token_ids) for sample in output.outputs)
        self._cached += output.outputs[0].metrics.cached_tokens

    def total(self) -> dict[str, Any]:
        """`cached_tokens` are those of the prompts, as its first sample found them; known when that has ended."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }
