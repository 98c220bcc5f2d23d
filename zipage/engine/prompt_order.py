"""A prompt as it is handed to a core, in this process or another."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from zipage.eviction.rule import EvictionRule
from zipage.outputs import FinishReason
from zipage.sampling_params import SamplingParams
from zipage.scheduling.request import Request


class PromptOrder(NamedTuple):
    """All that the samples of a prompt are made from but their rule, as plain data; fields are those of `Request`."""

    request_id: str
    token_ids: array
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    bad_words: list[list[int]]
    max_total_tokens: int
    limit_reason: FinishReason
    arrival: float
    follow: bool

    @classmethod
    def of(cls, samples: Sequence[Request]) -> PromptOrder:
        """The order from which samples that have not begun were made."""
        first = samples[0]
        return cls(
            first.request_id,
            first.token_ids,
            first.sampling_params,
            first.seed,
            first.stop_ids,
            first.bad_words,
            first.max_total_tokens,
            first.limit_reason,
            first.arrival,
            first.follow,
        )

    def samples(self, rule: EvictionRule | None, kind: type[Request] = Request) -> list[Request]:
        """The `params.n` samples, under what bounds their cache."""
        samples = [
            kind(
                self.request_id,
                self.token_ids,
                self.params,
                index=index,
                seed=self.seed,
                stop_ids=self.stop_ids,
                bad_words=self.bad_words,
                max_total_tokens=self.max_total_tokens,
                limit_reason=self.limit_reason,
                rule=rule,
                arrival=self.arrival,
            )
            for index in range(self.params.n)
        ]
        for sample in samples:
            sample.siblings = samples
            sample.follow = self.follow
        return samples
