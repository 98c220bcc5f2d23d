"""What the engine gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from zipage.stats import RequestMetrics

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "capacity", "abort", "error"]
"""Why a sample ended.

`stop`: an end token, a stop token or a stop string. `length`: `max_tokens` or the model's context. `capacity`: alone in
the pool, it would need more blocks than there are. `abort`: the caller withdrew it. `error`: `CompletionOutput.error`
says why, or `RequestOutput.error` where the prompt was refused.
"""


@dataclass(slots=True)
class Logprob:
    """A token's log-probability under the raw logits, its rank among all (1 is the most likely), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sample of one prompt.

    `logprobs`, where asked for, holds for each token a dictionary by token id: the chosen token first, then the most
    likely ones. `cumulative_logprob` is the sum over the chosen tokens.

    `text` ends before the end token, stop token or stop string that ended the sample; `token_ids` hold its tokens.
    `error` is None, or one line that says what ended the sample early; text and tokens are those until then.

    `hidden_states`, where asked for, is [T, width] in the model's dtype, on the host: what each of the tokens was drawn
    from, for `LLM.compute_logits`. Tokens and text hold forced tokens and follow-ups as well as what was drawn.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None
    hidden_states: Tensor | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        if self.logprobs is None:
            return None
        return sum(of[token].logprob for token, of in zip(self.token_ids, self.logprobs, strict=True))

    def finished(self) -> bool:
        return self.finish_reason is not None


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

    @property
    def finished(self) -> bool:
        """Always: outputs are handed over whole."""
        return all(output.finished() for output in self.outputs)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV was there already, of all samples together."""
        return self.metrics.cached_tokens


@dataclass(slots=True)
class StreamEvent:
    """One new token of one sample. `text` is what became certain with it (may be empty, may span several tokens);
    `finish_reason` is set on the sample's last event, which carries no token when the sample ended without one.
    `logprob` is the token's, `logprobs` as in `CompletionOutput`, where asked for. The sample's last event has its
    `stop_reason` and `metrics` as well."""

    request_id: str
    index: int
    token_id: int | None
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: dict[int, Logprob] | None = None
    stop_reason: int | str | None = None
    metrics: RequestMetrics | None = None
