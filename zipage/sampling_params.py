"""What one request asks of the sampler and of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Annotated, Any

from zipage.checks import Count, Share, Text, Unit, at_least, between, check_fields, check_names, shown
from zipage.eviction.protection import Protection
from zipage.unsupported import SAMPLING_OPTIONS, drop_unsupported

GREEDY_BELOW = 1e-5
"""Logits divided by less may leave the range of float32."""
MOST_LOGPROBS = 20
"""Most likely tokens that a request may ask to see, as in OpenAI's interface."""

Penalty = Annotated[float, between(-2, 2)]
NumLogprobs = Annotated[int, between(0, MOST_LOGPROBS)]
TokenId = Annotated[int, at_least(0)]


def _named(cls: type) -> type:
    """Make a keyword that the dataclass `cls` does not have a ValueError that says what to do."""
    init = cls.__init__

    @wraps(init)
    def __init__(self, *args: Any, **options: Any) -> None:
        if options.keys() - cls.__dataclass_fields__.keys():
            options = drop_unsupported(cls.__name__, options, SAMPLING_OPTIONS)
            check_names(options, cls.names(), cls.__name__)
        init(self, *args, **options)

    cls.__init__ = __init__
    return cls


@_named
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request; names and meanings follow vLLM.

    Attributes:
        n: samples drawn from the prompt, at most 16,384; they share the prompt's KV blocks.
        temperature: logits are divided by it; 0 is greedy, and so is what is below 1e-5, which is stored as 0.
        top_k: keep the `top_k` most likely tokens; 0 keeps all, and so does -1, which is stored as 0.
        top_p: keep the smallest set of most likely tokens whose probability reaches `top_p`.
        min_p: keep tokens at least `min_p` times as likely as the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (CTRL, arXiv 1909.05858, section 4.1); from 1e-6 to 1e6.
        presence_penalty: subtracted from the logits of tokens that the output has, in [-2, 2].
        frequency_penalty: subtracted from the logit of a token as often as the output has it, in [-2, 2].
        logit_bias: added to the logits of tokens, by token id, in [-100, 100].
        bad_words: texts that are not generated: the token that would complete one is banned. Several, or None.
        min_tokens: until this many new tokens, no token that would end the request is drawn, and no stop string counts.
        seed: makes the samples of this request a function of (seed, sample index, token index) alone, whatever else is
            in the batch. None derives one from the engine's seed and the request's number.
        stop: generation ends where one of these strings appears; the text ends before it. A string, several, or None.
        stop_token_ids: generation ends with one of these tokens, beside the model's own end tokens. Several, or None.
            The text ends before such a token and before an end token; `token_ids` hold it.
        include_stop_str_in_output: the text ends behind the stop string, stop token or end token instead.
        max_tokens: new tokens at most; None: to the end of the model's context.
        ignore_eos: the model's own end tokens do not end the request.
        logprobs: return, for each new token, its log-probability and those of the `logprobs` most likely tokens, 0 to
            20, of the raw logits, before any of the above. None returns none; True is 1.
        detokenize: give the text; otherwise token ids alone.
        skip_special_tokens: leave special tokens out of the text.
        budget_tokens: KV budget of this request per layer and KV head; None takes the engine's.
        forced_token_ids: the output begins with these tokens, whatever is drawn in their places (teacher forcing). They
            do not end the request.
        follow_ups: lists of token ids, such as the next questions of a conversation. As long as one is left, an end
            token does not end the request: the output goes on with that list, and then with drawn tokens.
        max_turn_tokens: drawn tokens of one answer at most: before each follow-up, and after the last one. An answer
            that is cut short before a follow-up ends with the first of `stop_token_ids`.
        return_hidden_states: return the hidden state, after the final norm, that each output token was drawn from:
            `width` numbers a token, copied to the host in every step.
        policy: eviction policy of this request, by its registered name, with its default options: "full", or one that
            needs no more queries and state than the engine's reserves; None takes the engine's with its options.
        protection: leading entries of this request that always stay: "none", "sink:N", "prompt"; None takes the
            engine's.

    Beside the fields, `edits_logits` says whether logits are changed before a draw, and `needs_history` whether that
    takes the tokens drawn so far.

    Raises:
        ValueError: a value is of the wrong type or outside its range, or the option is vLLM's alone; the message names
            the field, the value and the remedy.
    """

    n: Annotated[int, between(1, 16_384)] = 1
    temperature: Annotated[float, at_least(0)] = 1.0
    top_k: Annotated[int, at_least(-1)] = 0
    top_p: Share = 1.0
    min_p: Unit = 0.0
    repetition_penalty: Annotated[float, between(1e-6, 1e6)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Mapping[TokenId, Annotated[float, between(-100, 100)]] | None = field(default=None, hash=False)
    bad_words: tuple[Text, ...] = ()
    min_tokens: Annotated[int, at_least(0)] = 0
    seed: int | None = None
    stop: tuple[Text, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    include_stop_str_in_output: bool = False
    max_tokens: Count | None = 16
    ignore_eos: bool = False
    logprobs: NumLogprobs | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    forced_token_ids: tuple[TokenId, ...] = ()
    follow_ups: tuple[tuple[TokenId, ...], ...] = ()
    max_turn_tokens: Count | None = None
    return_hidden_states: bool = False
    budget_tokens: Count | None = None
    policy: Text | None = None
    protection: Text | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                object.__setattr__(self, name, () if value is None else (value,))
        if isinstance(self.logprobs, bool):
            object.__setattr__(self, "logprobs", 1 if self.logprobs else None)
        check_fields(self, "SamplingParams.")
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"SamplingParams.min_tokens={self.min_tokens}: must be at most max_tokens={self.max_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ValueError(
                f"SamplingParams.detokenize=False: stop={shown(self.stop)} needs the text; use stop_token_ids"
            )
        if self.protection is not None:
            Protection.parse(self.protection, where="SamplingParams.")
        self._check_turns()
        needs_history = bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.bad_words
        )
        object.__setattr__(self, "needs_history", needs_history)
        object.__setattr__(self, "edits_logits", bool(needs_history or self.logit_bias or self.min_tokens))

    def _check_turns(self) -> None:
        if self.max_tokens is not None and len(self.forced_token_ids) > self.max_tokens:
            raise ValueError(
                f"SamplingParams.forced_token_ids: {len(self.forced_token_ids)} tokens, which is more than "
                f"max_tokens={self.max_tokens}: raise max_tokens"
            )
        if not all(self.follow_ups):
            raise ValueError("SamplingParams.follow_ups: one of them has no tokens: leave it out")
        if self.follow_ups and self.max_turn_tokens is not None and not self.stop_token_ids:
            raise ValueError(
                f"SamplingParams.max_turn_tokens={self.max_turn_tokens}: an answer that is cut short ends with the "
                "first of stop_token_ids: give one"
            )
        for name in ("forced_token_ids", "follow_ups", "return_hidden_states"):
            if getattr(self, name) and self.stop:
                raise ValueError(f"SamplingParams.stop={shown(self.stop)}: does not go with {name}: use stop_token_ids")
        for name in ("forced_token_ids", "follow_ups"):
            if getattr(self, name) and self.logprobs is not None:
                raise ValueError(
                    f"SamplingParams.logprobs={self.logprobs}: is of drawn tokens and does not go with {name}: use "
                    "return_hidden_states and LLM.compute_logits"
                )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))
