"""What one request asks of the sampler and of the cache."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from zipage.checks import Count, Share, Text, Unit, at_least, between, check_fields

GREEDY_BELOW = 1e-5
"""Logits divided by less may leave the range of float32."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request; names and meanings follow vLLM.

    Attributes:
        n: samples drawn from the prompt, at most 16,384; they share the prompt's KV blocks.
        temperature: logits are divided by it; 0 is greedy, and so is what is below 1e-5, which is stored as 0.
        top_k: keep the `top_k` most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches `top_p`.
        min_p: keep tokens at least `min_p` times as likely as the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (CTRL, arXiv 1909.05858, section 4.1); from 1e-6 to 1e6.
        seed: makes the samples of this request a function of (seed, sample index, token index) alone, whatever else is
            in the batch. None derives one from the engine's seed and the request's number.
        stop: generation ends where one of these strings appears; the text ends before it. A string, several, or None.
        stop_token_ids: generation ends with one of these tokens, beside the model's own end tokens. Several, or None.
            The text ends before such a token and before an end token; `token_ids` hold it.
        max_tokens: new tokens at most.
        ignore_eos: the model's own end tokens do not end the request.
        logprobs: return the log-probability of each chosen token (of the raw logits, before any of the above).
        skip_special_tokens: leave special tokens out of the text.
        budget_tokens: KV budget of this request per layer and KV head; None takes the engine's.
        policy: eviction policy of this request, by its registered name, with its default options: "full", or one that
            needs no more queries and state than the engine's reserves; None takes the engine's with its options.

    Raises:
        ValueError: a value is of the wrong type or outside its range; the message names the field, the value and what
            it must be.
    """

    n: Annotated[int, between(1, 16_384)] = 1
    temperature: Annotated[float, at_least(0)] = 1.0
    top_k: Annotated[int, at_least(0)] = 0
    top_p: Share = 1.0
    min_p: Unit = 0.0
    repetition_penalty: Annotated[float, between(1e-6, 1e6)] = 1.0
    seed: int | None = None
    stop: tuple[Text, ...] = ()
    stop_token_ids: tuple[Annotated[int, at_least(0)], ...] = ()
    max_tokens: Count = 16
    ignore_eos: bool = False
    logprobs: bool = False
    skip_special_tokens: bool = True
    budget_tokens: Count | None = None
    policy: Text | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                object.__setattr__(self, name, () if value is None else (value,))
        check_fields(self, "SamplingParams.")
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))
