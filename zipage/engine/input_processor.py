"""From a prompt and its options to the samples that the scheduler runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from zipage.checks import shown
from zipage.config import EngineConfig
from zipage.eviction import registry
from zipage.eviction.policy import Policy
from zipage.eviction.rule import EvictionRule
from zipage.outputs import FinishReason
from zipage.sampling_params import SamplingParams
from zipage.scheduling.request import Request
from zipage.worker.kv_cache import KVCache
from zipage.worker.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
BYTES = (bytes, bytearray, memoryview)
"""Lists of integers that are no tokens."""
SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds that engines of neighbouring seeds give their requests."""


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    try:
        items = None if isinstance(prompts, (*BYTES, Mapping)) else list(prompts)
    except TypeError:
        items = None
    if items is None:
        raise ValueError(f"prompts={shown(prompts)}: must be a text, a list of token ids, or a list of either")
    return [items] if items and _is_token(items[0]) else items


def _is_token(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


class InputProcessor:
    """Checks what is asked of the engine against what it has.

    Args:
        config, memory_plan, max_model_len, policy: of the engine; policy None is full KV.
        cache: of the engine; what it keeps decides which policies a request may name.
        tokenizer: None where prompts are token ids only.
        vocab_size: token ids are below it.
        eos_token_ids: end a request that does not ignore them.
    """

    def __init__(
        self,
        config: EngineConfig,
        memory_plan: MemoryPlan,
        cache: KVCache,
        *,
        max_model_len: int,
        policy: Policy | None,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._config = config
        self._memory_plan = memory_plan
        self._cache = cache
        self._max_model_len = max_model_len
        self._policies = {None: policy, config.policy: policy, "full": None}
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._warned_of_budget = False

    def samples(
        self, prompt: Prompt, params: SamplingParams, request_id: str, number: int, follow: bool = False
    ) -> list[Request]:
        """The `params.n` samples of a prompt, `number` of the engine's requests.

        Args:
            follow: the tokens are wanted one by one.

        Raises:
            ValueError: the prompt or an option can't be served.
        """
        token_ids = self._tokenize(prompt)
        self._check(token_ids)
        self._check_stops(params)
        rule = self._rule(token_ids, params)
        limit, reason = self._limit(len(token_ids), params, rule)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self._eos_token_ids
        seed = number + self._config.seed * SEED_STEP if params.seed is None else params.seed
        now = time.perf_counter()
        samples = [
            Request(
                request_id,
                token_ids,
                params,
                index=index,
                seed=seed % 2**63,
                stop_ids=stop_ids,
                max_total_tokens=limit,
                limit_reason=reason,
                rule=rule,
                arrival=now,
            )
            for index in range(params.n)
        ]
        for sample in samples:
            sample.siblings = samples
            sample.follow = follow
        return samples

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the prompt is text, but skip_tokenizer_init=True: give token ids")
            return self._encode(prompt)
        is_list = isinstance(prompt, (Sequence, np.ndarray)) and not isinstance(prompt, BYTES)
        if not is_list or not all(_is_token(token) for token in prompt):
            raise ValueError(f"a prompt is text or a list of token ids, not {shown(prompt)}")
        bad = next((token for token in prompt if not 0 <= token < self._vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {shown(bad)} is outside the vocabulary of {self._vocab_size}")
        return [int(token) for token in prompt]

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
            token_ids = self.tokenizer.encode(prompt)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt's character {error.start} is {prompt[error.start]!r}, a lone surrogate, which is no text: "
                "leave it out, or decode the bytes that it came from anew"
            ) from error
        except Exception as error:  # tokenizers raises bare Exception
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"the tokenizer cannot encode the prompt ({reason})") from error
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

    def _check_stops(self, params: SamplingParams) -> None:
        if params.stop and self.tokenizer is None:
            raise ValueError("SamplingParams.stop needs text, but skip_tokenizer_init=True: use stop_token_ids")
        bad = next((token for token in params.stop_token_ids if token >= self._vocab_size), None)
        if bad is not None:
            raise ValueError(f"SamplingParams.stop_token_ids: {bad} is outside the vocabulary of {self._vocab_size}")

    def _rule(self, token_ids: list[int], params: SamplingParams) -> EvictionRule | None:
        """What bounds the request's cache; None for full KV."""
        if params.policy not in self._policies:
            self._policies[params.policy] = self._make_policy(params.policy)
        policy = self._policies[params.policy]
        if policy is None:
            if params.budget_tokens is not None and not self._warned_of_budget:
                self._warned_of_budget = True
                logger.warning("policy 'full' never evicts: SamplingParams.budget_tokens has no effect")
            return None
        return self._config.rule(policy, params.budget_tokens or self._config.budget_tokens, len(token_ids))

    def _make_policy(self, name: str) -> Policy | None:
        if ":" in name and name not in registry.POLICIES:
            raise ValueError(
                f"SamplingParams.policy={name!r}: must be the name of a registered policy; a request imports nothing"
            )
        policy, cache = registry.make(name), self._cache
        if not policy.evicts:
            return None
        needs = {
            "the entries' positions": cache.positions is None,
            "scores": policy.state and cache.scores is None,
            f"{policy.num_queries} queries a request": policy.num_queries > cache.window,
        }
        lacks = [what for what, is_missing in needs.items() if is_missing]
        if lacks:
            raise ValueError(
                f"SamplingParams.policy={name!r}: needs {' and '.join(lacks)}, for which an engine of policy "
                f"{self._config.policy!r} reserves no memory: start one of policy {name!r}"
            )
        return policy

    def _limit(self, length: int, params: SamplingParams, rule: EvictionRule | None) -> tuple[int, FinishReason]:
        """The logical length at which the request ends, and the finish reason then."""
        limit = min(length + params.max_tokens, self._max_model_len)
        plan = self._memory_plan
        if limit <= plan.num_slots or (rule is not None and rule.max_blocks <= plan.num_blocks):
            return limit, "length"
        return plan.num_slots, "capacity"
