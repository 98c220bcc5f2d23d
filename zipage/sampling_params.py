"""What one request asks of the sampler and of the cache."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from zipage.checks import Range, above, at_least, between, check_fields

GREEDY = 1e-5
"""Temperatures below this are 0: divided by them, logits leave the range of float32. vLLM draws the same line."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request; names and meanings follow vLLM.

    Attributes:
        n: samples drawn from the prompt; they share the prompt's KV blocks.
        temperature: 0 is greedy, and so is what is below 1e-5; otherwise logits are divided by it.
        top_k: keep the `top_k` most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches `top_p`.
        min_p: keep tokens at least `min_p` times as likely as the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (CTRL, arXiv 1909.05858, section 4.1).
        seed: makes the samples of this request a function of (seed, sample index, token index) alone, whatever else is
            in the batch. None derives one from the engine's seed and the request's number.
        stop: generation ends where one of these strings appears; the text ends before it. None or a string will do.
        stop_token_ids: generation ends with one of these tokens, beside the model's own end tokens. None will do.
        max_tokens: new tokens at most.
        ignore_eos: the model's own end tokens do not end the request.
        logprobs: return the log-probability of each chosen token (of the raw logits, before any of the above).
        skip_special_tokens: leave special tokens out of the text.
        budget_tokens: KV budget of this request per layer and KV head; None takes the engine's.
        policy: eviction policy of this request, by its registered name, with its default options: "full", or one that
            needs no more queries and state than the engine's reserves; None takes the engine's with its options.

    Raises:
        ValueError: a value is of another type or outside its range; the message names field, value and range.
    """

    n: Annotated[int, between(1, 16_384)] = 1
    temperature: Annotated[float, between(0, 1e6)] = 1.0
    top_k: Annotated[int, Range(lambda k: 0 <= k < 2**31, "in [0, 2**31), where 0 keeps all")] = 0
    top_p: Annotated[float, above(0, 1)] = 1.0
    min_p: Annotated[float, between(0, 1)] = 0.0
    repetition_penalty: Annotated[float, between(1e-3, 1e3)] = 1.0
    seed: int | None = None
    stop: Annotated[tuple[str, ...], Range(all, "non-empty strings")] = ()
    stop_token_ids: Annotated[tuple[int, ...], Range(lambda ids: all(i >= 0 for i in ids), "at least 0")] = ()
    max_tokens: Annotated[int, at_least(1)] = 16
    ignore_eos: bool = False
    logprobs: bool = False
    skip_special_tokens: bool = True
    budget_tokens: Annotated[int | None, at_least(1)] = None
    policy: str | None = None

    def __post_init__(self) -> None:
        if self.stop is None or isinstance(self.stop, str):
            object.__setattr__(self, "stop", () if self.stop is None else (self.stop,))
        if self.stop_token_ids is None:
            object.__setattr__(self, "stop_token_ids", ())
        check_fields(self, "SamplingParams.")
        if self.temperature < GREEDY:
            object.__setattr__(self, "temperature", 0.0)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))
