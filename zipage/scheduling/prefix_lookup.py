"""Finds the part of a request's text that the cache holds already, and registers its blocks in the prefix index."""

from __future__ import annotations

from typing import NamedTuple

from zipage.scheduling.block_pool import ROOT, BlockPool
from zipage.scheduling.request import Request, Status
from zipage.scheduling.sliding_blocks import SlidingBlocks, SlidingPrefix
from zipage.scheduling.triggers import Trigger


class CachedPrefix(NamedTuple):
    """The beginning of a text that is in the cache already.

    Attributes:
        shared: full blocks to share, and `prefix_ids` at their ends.
        num_cached: tokens that they hold together with the copy of `tail`.
        tail: a sibling's last prompt block, not full, to copy; or None.
        sliding: what of it sliding layers need.
    """

    shared: list[int]
    prefix_ids: list[int]
    num_cached: int
    tail: int | None
    sliding: SlidingPrefix = SlidingPrefix()


class PrefixLookup:
    """Finds blocks to share in the pool's prefix index and among a request's siblings.

    Args:
        shares_prefixes: a request may begin behind a prefix whose blocks it shares. Not so where the model keeps a
            state that blocks don't hold.
        sliding: blocks of sliding layers, which have to hold the end of a prefix, too; None: there are no such layers.
    """

    def __init__(
        self,
        pool: BlockPool,
        trigger: Trigger,
        shares_prefixes: bool = True,
        sliding: SlidingBlocks | None = None,
    ) -> None:
        self.pool = pool
        self.trigger = trigger
        self.sliding = sliding
        self.shares_prefixes = shares_prefixes and pool.shares_blocks

    def num_to_compute(self, request: Request) -> int:
        """Entries of a request's known text before its first compression.

        Of a text that is computed again, the token that came after a compression fell due, or after the pool was full,
        is computed after it.
        """
        if request.rule is None:
            return request.num_tokens
        return min(request.num_tokens, self.trigger.most_entries(request))

    def find(self, request: Request) -> CachedPrefix | None:
        """What of a request's text the cache holds, or None while a sibling still computes the prompt that both share.

        At least one token is left to compute, since the step needs its logits, and as many as the window of the
        request's first compression may reach back to, since it needs their queries.
        """
        if not self.shares_prefixes:
            return CachedPrefix([], [], 0, None)
        size = self.pool.block_size
        donor = None
        pending = False
        for sibling in request.siblings:
            if sibling is not request and sibling.status in (Status.RUNNING, Status.COMPRESSING):
                if sibling.num_computed >= sibling.num_prompt_tokens:
                    donor = sibling
                    if donor.num_compressions == 0 and donor.status is Status.RUNNING:
                        break
                else:
                    pending = True
        if pending and donor is None:
            return None
        limit = self.num_to_compute(request) - 1
        if request.rule is not None and request.rule.window:
            limit = max(0, min(limit, self.trigger.fewest_entries(request) - request.rule.window))
        indexed = self._indexed(request, limit // size)
        if donor is None:
            return indexed
        num_cached = min(limit, request.num_prompt_tokens - 1)
        tail = None
        is_whole = donor.num_compressions == 0 and donor.status is Status.RUNNING
        full = num_cached // size
        if not is_whole:
            full = min(full, donor.rule.pinned_blocks)
        elif num_cached == request.num_prompt_tokens - 1 and num_cached % size:
            tail = donor.block_ids[full]
        if tail is None:
            num_cached = full * size
        if indexed.num_cached >= num_cached:
            return indexed
        shared = CachedPrefix(donor.block_ids[:full], donor.prefix_ids[:full], num_cached, tail)
        if self.sliding is None:
            return shared
        of_sliding = self.sliding.share(donor, num_cached)
        return indexed if of_sliding is None else shared._replace(sliding=of_sliding)

    def _indexed(self, request: Request, max_blocks: int) -> CachedPrefix:
        """What the prefix index finds of a text, `max_blocks` at most."""
        blocks, prefix_ids = self.pool.find_prefix(request.token_ids, max_blocks)
        if self.sliding is None:
            return CachedPrefix(blocks, prefix_ids, len(blocks) * self.pool.block_size, None)
        sliding = self.sliding.find(prefix_ids)
        count = sliding.first + len(sliding.shared)
        return CachedPrefix(blocks[:count], prefix_ids[:count], count * self.pool.block_size, None, sliding)

    def unchanged_blocks(self, request: Request) -> list[int]:
        """Leading blocks of a paused request that still hold what they held: an id of a prefix is never used again."""
        blocks, prefix_ids = self.pool.find_prefix(request.token_ids, len(request.prefix_ids))
        same = 0
        for place, (block, prefix_id) in enumerate(zip(blocks, prefix_ids, strict=True)):
            if (block, prefix_id) != (request.block_ids[place], request.prefix_ids[place]):
                break
            same += 1
        return blocks[:same]

    def adopt(self, request: Request, prefix: CachedPrefix) -> None:
        """The request begins with a prefix that was found."""
        request.prefix_ids = prefix.prefix_ids

    def cut(self, request: Request, num_blocks: int) -> None:
        """Blocks from `num_blocks` on hold another prefix than the index was told of, or none."""
        del request.prefix_ids[num_blocks:]

    def register(self, request: Request) -> None:
        """Tell the prefix index of full blocks whose tokens are known. Entries after an eviction are of no prefix."""
        if request.num_compressions:
            return
        size = self.pool.block_size
        prefix_ids = request.prefix_ids
        num_known = request.num_tokens - request.num_pending
        for i in range(len(prefix_ids), min(request.cache_len, num_known) // size):
            tokens = request.token_ids[i * size : (i + 1) * size]
            parent_id = prefix_ids[-1] if prefix_ids else ROOT
            prefix_ids.append(self.pool.register(request.block_ids[i], parent_id, tokens))
        if self.sliding is not None:
            self.sliding.register(request)
