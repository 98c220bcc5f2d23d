"""Blocks that admission leaves free for those who run."""

from __future__ import annotations

from collections.abc import Iterable

from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.prefix_lookup import PrefixLookup
from zipage.scheduling.request import Request, Status
from zipage.scheduling.swap_space import SwapSpace
from zipage.scheduling.triggers import Trigger
from zipage.tile_table import num_blocks

HEADROOM = 128
"""Entries of each running request for which room is kept when another is admitted. With less, more are admitted that
must soon leave again, to be computed anew; with more, the pool stands empty (`tests/benchmarks/growth.py`).
"""
COPIED_HEADROOM = 32
"""The same where those who leave are copied to host memory, beside steps, so that leaving costs little."""


def entries_to_keep(swap_space: SwapSpace, block_size: int) -> int:
    """Entries of each running request for which an engine keeps room."""
    return COPIED_HEADROOM if swap_space.copies_blocks(block_size) else HEADROOM


class Headroom:
    """Counts blocks that requests will take from the pool.

    Args:
        num_entries: of each running request for which room is kept.
    """

    def __init__(self, pool: BlockPool, trigger: Trigger, prefixes: PrefixLookup, num_entries: int = HEADROOM) -> None:
        self.pool = pool
        self.trigger = trigger
        self.prefixes = prefixes
        self.num_entries = num_entries

    def of_all(self, running: Iterable[Request]) -> int:
        return sum(map(self.of, running))

    def of(self, request: Request) -> int:
        """Blocks that a running request lacks for its next entries, as far as no compression comes before."""
        length = min(request.num_tokens + self.num_entries, request.max_total_tokens - 1)
        blocks = -(-(request.cache_len + length - request.num_computed) // self.pool.block_size)
        if request.rule is not None:
            blocks = min(blocks, self.trigger.blocks_to_expect(request))
        return max(0, blocks - len(request.block_ids))

    def wanted_by(self, request: Request) -> int:
        """Blocks that the return or admission of a request takes from the free ones."""
        if request.status is Status.PAUSED:
            shared = self.prefixes.unchanged_blocks(request)
            total = num_blocks(request.block_ids) + self.next_block(request)
        else:
            prefix = self.prefixes.find(request)
            if prefix is None:
                return 0
            shared = prefix.shared
            total = -(-self.prefixes.num_to_compute(request) // self.pool.block_size)
        return total - sum(self.pool.ref_counts[block] > 0 for block in shared)

    def num_short(self, running: Iterable[Request], head: Request | None) -> int:
        """Blocks that decodes at a block's end want beyond the free ones, and `head` of the queue if it may enter."""
        size = self.pool.block_size
        wanted = sum(
            request.cache_len == len(request.block_ids) * size
            and request.status is Status.RUNNING
            and not request.has_all_tokens
            for request in running
        )
        if head is not None:
            wanted += self.wanted_by(head) + self.of_all(running)
        return wanted - self.pool.num_free

    def next_block(self, request: Request) -> int:
        """Blocks that a paused request needs for its next token beside those it had, unless it is compressed first."""
        held = len(request.block_ids) * self.pool.block_size
        if request.cache_len < held:
            return 0
        return int(request.rule is None or held < self.trigger.most_entries(request))
