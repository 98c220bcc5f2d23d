"""What the engine gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from zipage.stats import RequestMetrics

FinishReason = Literal["stop", "length", "capacity", "abort", "error"]
"""Why a sample ended.

`stop`: an end token, a stop token or a stop string. `length`: `max_tokens` or the model's context. `capacity`: alone in
the pool, it would need more blocks than there are. `abort`: the caller withdrew it. `error`: `CompletionOutput.error`
says why, or `RequestOutput.error` where the prompt was refused.
"""


@dataclass(slots=True)
class CompletionOutput:
    """One sample of one prompt. `logprobs` holds one float a token when asked for.

    `text` ends before the end token, stop token or stop string that ended the sample; `token_ids` hold its tokens.
    `error` is None, or one line that says what ended the sample early; text and tokens are those until then.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[float] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """All samples of one prompt. `error` is None, or one line: why the prompt was refused, or what ended the first of
    its samples that ended with an error."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None


@dataclass(slots=True)
class StreamEvent:
    """One new token of one sample. `text` is what became certain with it (may be empty, may span several tokens);
    `finish_reason` is set on the sample's last event, which carries no token when the sample ended without one."""

    request_id: str
    index: int
    token_id: int | None
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
