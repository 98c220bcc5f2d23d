"""From a prompt and its options to the samples that the scheduler runs."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zipage.checks import check_names, checked, shown
from zipage.config import EngineConfig
from zipage.engine.chat_template import chosen_template, template_reads
from zipage.engine.core_spec import CoreSpec
from zipage.engine.prompt_order import PromptOrder
from zipage.engine.rules import Rules
from zipage.eviction.fault import described
from zipage.eviction.rule import EvictionRule
from zipage.models.loading.tokenizer import end_of_sequence_ids, is_tokenizer_error
from zipage.outputs import FinishReason
from zipage.sampling_params import SamplingParams
from zipage.scheduling.request import Request
from zipage.unsupported import PROMPT_KEYS, drop_unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""
Message = Mapping[str, Any]
"""Of a chat: `{"role": ..., "content": ...}`."""
BYTES = (bytes, bytearray, memoryview)
"""Lists of integers that are no tokens."""
MOST_WORD_LISTS = 16
"""Lists of bad words whose tokens are kept."""
TEMPLATE_OPTIONS = frozenset(
    [
        *("self", "messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    ]
)
"""Names that are not the template's to read: of arguments that say how the messages become tokens."""
SPECIAL_TOKENS = frozenset(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Names that templates read of the tokenizer. Many write one behind each message, so that of any length it would make
gigabytes of a small request."""
LONGEST_REASON = 500
"""Characters of an error that is told: a template may say again all that it was given."""
SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds that engines of neighbouring seeds give their requests."""


class Tokens(NamedTuple):
    """A prompt as the engine takes it; `text` is None where it was token ids."""

    text: str | None
    token_ids: list[int]


def read(prompt: Any, tokenize: Callable[[Any], Tokens]) -> Tokens:
    """A prompt's tokens. Raises ValueError, whatever its own methods raise."""
    try:
        return tokenize(prompt)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the prompt cannot be read ({_reason(error)})") from error


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    try:
        items = None if isinstance(prompts, BYTES) else list(prompts)
    except TypeError:
        items = None
    if items is None:
        raise ValueError(f"prompts={shown(prompts)}: must be a text, a list of token ids, or a list of either")
    return [items] if items and _is_token(type(items[0])) else items


def as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """One conversation or several, as a list.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(messages, Sequence) and not isinstance(messages, (str, *BYTES)):
        if messages and all(isinstance(message, Mapping) for message in messages):
            return [messages]
        if all(isinstance(chat, Sequence) and not isinstance(chat, (str, *BYTES)) for chat in messages):
            return list(messages)
    raise ValueError(f"messages={shown(messages)}: must be a list of messages, or a list of such lists")


def text_of(prompt: Prompt) -> str | None:
    """The prompt's text, where it has one."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return text if isinstance(text, str) else None


def _reason(error: BaseException) -> str:
    text = described(error)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def _is_token(kind: type) -> bool:
    return issubclass(kind, (int, np.integer)) and not issubclass(kind, bool)


class InputProcessor:
    """Checks what is asked of the engine against what it has.

    Args:
        config: of the engine.
        core: what its core serves.
        tokenizer: None where prompts are token ids only.
        clock: of the core.

    Attributes:
        request_type: of the samples that it makes.
    """

    request_type = Request

    def __init__(
        self,
        config: EngineConfig,
        core: CoreSpec,
        tokenizer: PreTrainedTokenizerBase | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._clock = clock
        self._memory_plan = core.memory_plan
        self._max_model_len = core.max_model_len
        self._vocab_size = core.vocab_size
        self._eos_token_ids = end_of_sequence_ids(core.eos_token_ids, tokenizer)
        self._rules = Rules(config)
        self.tokenizer = tokenizer
        self._warned_of_idle = False
        self._encoded_words = lru_cache(MOST_WORD_LISTS)(self._encode_words)

    def samples(
        self, token_ids: list[int], params: SamplingParams, request_id: str, number: int, follow: bool = False
    ) -> list[Request]:
        """The `params.n` samples of a prompt, `number` of the engine's requests.

        Args:
            follow: the tokens are wanted one by one.

        Raises:
            ValueError: the prompt or an option can't be served.
        """
        self._check(token_ids)
        self._check_tokens(params)
        rule = self._rule(token_ids, params)
        limit, reason = self._limit(len(token_ids), params, rule)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self._eos_token_ids
        if params.follow_ups and not stop_ids:
            raise ValueError(
                "SamplingParams.follow_ups: each follows an end token, but there is none: give stop_token_ids"
            )
        bad_words = self._encoded_words(params.bad_words)
        seed = number + self._config.seed * SEED_STEP if params.seed is None else params.seed
        order = PromptOrder(
            request_id,
            array("i", token_ids),
            params,
            seed=seed % 2**63,
            stop_ids=stop_ids,
            bad_words=bad_words,
            max_total_tokens=limit,
            limit_reason=reason,
            arrival=self._clock(),
            follow=follow,
        )
        return order.samples(rule, self.request_type)

    def prepare(self, params: SamplingParams) -> None:
        """Encode bad words, which takes long where they are many: `samples` of the same words then need not.

        Raises:
            ValueError: one can't be encoded, or there is no tokenizer.
        """
        if params.bad_words:
            self._check_tokens(params)
            self._encoded_words(params.bad_words)

    def tokenize(self, prompt: Prompt) -> Tokens:
        """Raises ValueError for anything that is not a prompt or can't be encoded."""
        if not isinstance(prompt, Mapping):
            return Tokens(text_of(prompt), self._token_ids(prompt))
        keys = drop_unsupported("the prompt", {str(key): value for key, value in prompt.items()}, PROMPT_KEYS)
        check_names(keys, ("prompt", "prompt_token_ids"), "the prompt")
        ids, text = keys.get("prompt_token_ids"), keys.get("prompt")
        if ids is None and not isinstance(text, str):
            raise ValueError(
                f'a prompt is text or a list of token ids, as "prompt" or "prompt_token_ids", not {shown(prompt)}'
            )
        return Tokens(text_of(prompt), self._token_ids(text if ids is None else ids))

    def with_template(
        self,
        chat_template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> Callable[[Any], Tokens]:
        """`tokenize_chat` under options as `LLM.chat` takes them.

        Raises:
            ValueError: one is of the wrong type, two contradict each other, or the template does not read one.
        """
        options = {
            "add_generation_prompt": checked("add_generation_prompt", add_generation_prompt, bool),
            "continue_final_message": checked("continue_final_message", continue_final_message, bool),
        }
        if add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message=True: needs add_generation_prompt=False")
        more = checked("chat_template_kwargs", chat_template_kwargs, Mapping[str, Any] | None) or {}
        if taken := sorted(more.keys() & TEMPLATE_OPTIONS):
            raise ValueError(f"chat_template_kwargs: {taken[0]!r} is no variable of the template: leave it out")
        if taken := sorted(more.keys() & {*SPECIAL_TOKENS, *getattr(self.tokenizer, "special_tokens_map", ())}):
            raise ValueError(f"chat_template_kwargs: {taken[0]} is the tokenizer's to say: leave it out")
        template = checked("chat_template", chat_template, str | None)
        read = chosen_template(template, self.tokenizer)
        if read and (unread := [name for name in more if not template_reads(read, name)]):
            raise ValueError(f"chat_template_kwargs: the chat template reads no {shown(unread[0])}: leave it out")
        return partial(self.tokenize_chat, chat_template=template, **options | more)

    def tokenize_chat(self, messages: Sequence[Message], *, chat_template: str | None, **options: Any) -> Tokens:
        """A conversation as the chat template puts it; the template itself writes what special tokens there are.

        Args:
            chat_template: Jinja; None takes the tokenizer's.
            options: keywords for `apply_chat_template`.

        Raises:
            ValueError: there is no template, it refuses the messages, or the messages hold more than text.
        """
        if self.tokenizer is None:
            raise ValueError(
                "chat needs the tokenizer's template, but skip_tokenizer_init=True: use generate with token ids"
            )
        if chat_template is None and not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: give chat_template, or use generate")
        messages = [_text_message(message) for message in messages]
        if not messages:
            raise ValueError("the conversation has no messages")
        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **options)
        except Exception as error:  # the template is a program
            raise ValueError(f"the chat template refuses the messages ({_reason(error)})") from error
        return Tokens(text, self._encode(text, add_special_tokens=False))

    def _token_ids(self, prompt: object) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the prompt is text, but skip_tokenizer_init=True: give token ids")
            return self._encode(prompt)
        is_list = isinstance(prompt, (Sequence, np.ndarray)) and not isinstance(prompt, BYTES)
        if not is_list or not all(map(_is_token, set(map(type, prompt)))):
            raise ValueError(f"a prompt is text or a list of token ids, not {shown(prompt)}")
        if len(prompt) and not 0 <= min(prompt) <= max(prompt) < self._vocab_size:
            bad = next(token for token in prompt if not 0 <= token < self._vocab_size)
            raise ValueError(f"token id {shown(bad)} is outside the vocabulary of {self._vocab_size}")
        return list(map(int, prompt))

    def _encode(self, prompt: str, **options: Any) -> list[int]:
        try:
            prompt.encode()
            token_ids = self.tokenizer.encode(prompt, **options)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt's character {error.start} is {prompt[error.start]!r}, a lone surrogate: "
                "leave it out, or decode its source bytes again"
            ) from error
        except BaseException as error:
            if not is_tokenizer_error(error):
                raise
            raise ValueError(f"the tokenizer cannot encode the prompt ({_reason(error)})") from error
        bad = next((token for token in token_ids if token >= self._vocab_size), None)
        if bad is not None:
            token = self.tokenizer.convert_ids_to_tokens(bad)
            raise ValueError(
                f"the tokenizer gives token id {bad} ({token!r}), which is outside the vocabulary of "
                f"{self._vocab_size}: its embedding has no row for it"
            )
        return token_ids

    def _check(self, token_ids: list[int]) -> None:
        length, plan = len(token_ids), self._memory_plan
        if not length:
            raise ValueError("the prompt is empty: it needs at least one token")
        if length >= self._max_model_len:
            raise ValueError(
                f"the prompt has {length} tokens, max_model_len={self._max_model_len} leaves no room for an answer: "
                "shorten it"
            )
        if length >= plan.num_slots:
            raise ValueError(
                f"the prompt has {length} tokens, the KV pool holds {plan.num_slots} ({plan.num_blocks} blocks of "
                f"{plan.block_size}): raise num_blocks or shorten it"
            )

    def _check_tokens(self, params: SamplingParams) -> None:
        """Options that name texts need a tokenizer; those that name tokens, tokens of the vocabulary."""
        if self.tokenizer is None:
            for name, instead in (("stop", "use stop_token_ids"), ("bad_words", "use logit_bias")):
                if getattr(params, name):
                    raise ValueError(f"SamplingParams.{name} needs text, but skip_tokenizer_init=True: {instead}")
        named = {name: getattr(params, name) or () for name in ("stop_token_ids", "logit_bias", "forced_token_ids")}
        for name, tokens in (named | {"follow_ups": chain(*params.follow_ups)}).items():
            bad = next((token for token in tokens if token >= self._vocab_size), None)
            if bad is not None:
                raise ValueError(f"SamplingParams.{name}: {bad} is outside the vocabulary of {self._vocab_size}")

    def _encode_words(self, bad_words: tuple[str, ...]) -> list[list[int]]:
        """Tokens of each bad word at the beginning of a text and, where they are as many, after a space."""
        words = []
        for word in bad_words:
            bare, spaced = (self._encode(space + word.lstrip(), add_special_tokens=False) for space in ("", " "))
            if not bare:
                raise ValueError(f"SamplingParams.bad_words: {word!r} has no tokens")
            words.append(bare)
            if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
                words.append(spaced)
        return words

    def _rule(self, token_ids: list[int], params: SamplingParams) -> EvictionRule | None:
        """What bounds the request's cache; None for full KV."""
        rule = self._rules.of(params, len(token_ids))
        idle = [name for name in ("budget_tokens", "protection") if getattr(params, name) is not None]
        if rule is None and idle and not self._warned_of_idle:
            self._warned_of_idle = True
            logger.warning("policy 'full' never evicts: SamplingParams.%s has no effect", idle[0])
        return rule

    def _limit(self, length: int, params: SamplingParams, rule: EvictionRule | None) -> tuple[int, FinishReason]:
        """The logical length at which the request ends, and the finish reason then."""
        limit = self._max_model_len
        if params.max_tokens is not None:
            limit = min(length + params.max_tokens, limit)
        plan = self._memory_plan
        if limit <= plan.num_slots or (rule is not None and rule.peak_blocks <= plan.num_blocks):
            return limit, "length"
        return plan.num_slots, "capacity"


def _text_message(message: object) -> dict[str, Any]:
    """A message whose content is one text: templates differ in whether they take a list of parts."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message is {{'role': ..., 'content': ...}}, not {shown(message)}")
    content = message.get("content")
    if isinstance(content, str | None):
        return dict(message)
    parts = content if isinstance(content, Sequence) and not isinstance(content, BYTES) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"a message's content {shown(part)} is not supported: messages are text")
    return {**message, "content": "\n".join(part["text"] for part in parts)}
