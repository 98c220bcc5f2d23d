"""Factories for tests that schedule without a model."""

from __future__ import annotations

import random
from dataclasses import dataclass

from zipage.eviction.budget import Budget
from zipage.eviction.rule import EvictionRule
from zipage.sampling_params import SamplingParams
from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.request import Request
from zipage.scheduling.scheduler import Scheduler

EOS = 1


@dataclass(frozen=True)
class StubPolicy:
    """What the scheduler reads of a policy."""

    num_queries: int = 0
    page: int = 1
    drops_blocks: bool = False
    evicts: bool = True


def make_rule(
    max_blocks=3, block_size=4, *, interval_blocks=1, window=0, protected=0, recent=0, page=1, drops_blocks=False
) -> EvictionRule:
    policy = StubPolicy(window, block_size if drops_blocks else page, drops_blocks)
    return EvictionRule(policy, Budget(max_blocks, block_size, interval_blocks), protected, recent)


def make_scheduler(num_blocks=64, block_size=16, *, caching=True, headroom=0, **options) -> Scheduler:
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 64} | options
    return Scheduler(BlockPool(num_blocks, block_size, caching), headroom=headroom, **options)


def make_samples(name="r", prompt=20, max_tokens=8, n=1, rule=None) -> list[Request]:
    """Samples of one prompt; `prompt` is its length (distinct tokens for distinct names) or its tokens."""
    if isinstance(prompt, int):
        rng = random.Random(name)
        prompt = [rng.randrange(10, 1000) for _ in range(prompt)]
    params = SamplingParams(n=n, max_tokens=max_tokens)
    total = len(prompt) + max_tokens
    samples = [
        Request(name, prompt, params, index=i, stop_ids=frozenset([EOS]), max_total_tokens=total, rule=rule)
        for i in range(n)
    ]
    for sample in samples:
        sample.siblings = samples
    return samples


def make_request(name="r", prompt=20, max_tokens=8, rule=None) -> Request:
    return make_samples(name, prompt, max_tokens, rule=rule)[0]
