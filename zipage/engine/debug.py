"""Checks after every step, and NaN in all memory that holds nothing valid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from zipage.scheduling.batch import Batch
from zipage.scheduling.scheduler import Scheduler
from zipage.worker.kv_cache import KVCache


class DebugChecks:
    """Makes a read of freed or unwritten entries show as NaN, and a broken invariant as an error.

    Slow; for tests and for hunting corruption.
    """

    def __init__(self, scheduler: Scheduler, cache: KVCache) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._pools = [(scheduler.pool, cache)]
        cache.poison(slice(None))
        if scheduler.sliding is not None:
            self._pools.append((scheduler.sliding.pool, cache.sliding))
            cache.sliding.poison(slice(None))
        self._poisoned = [set(pool.unindexed_free_blocks()) for pool, _ in self._pools]
        cache.poison_queries(slice(None))
        self._poison_rows(range(scheduler.max_num_seqs))

    def before(self, batch: Batch) -> None:
        """Poison what the requests of a step own but have not written. Blocks were moved as the step demands."""
        size = self._cache.block_size
        self._poison_rows(chunk.request.row for chunk in batch.prefills if not chunk.request.num_computed)
        for request in chain(batch.decodes, (chunk.request for chunk in batch.prefills)):
            if request.query_slot >= 0 and request.queries_from == request.num_computed:
                self._cache.poison_queries(request.query_slot)
            if not self._scheduler.pool.shares_blocks:
                for tile, offset in request.block_ids.unwritten(request.cache_len, size):
                    self._cache.poison(tile, offset)
                continue
            _poison_end(self._cache, request.block_ids, request.cache_len)
            if self._scheduler.sliding is not None:
                table = request.sliding
                _poison_end(self._cache.sliding, table.block_ids, request.num_computed - table.first * size)

    def after(self) -> None:
        """Check pool, tables and rows; poison free blocks that no prefix refers to.

        Raises:
            RuntimeError: an invariant is broken.
        """
        self._scheduler.check_integrity()
        for place, (pool, cache) in enumerate(self._pools):
            dead = set(pool.unindexed_free_blocks())
            for block in dead - self._poisoned[place]:
                cache.poison(block)
            self._poisoned[place] = dead
        self._poison_rows({*range(self._scheduler.max_num_seqs)} - {r.row for r in self._scheduler.running})

    def _poison_rows(self, rows: Iterable[int]) -> None:
        """Those of recurrent layers, where there are any."""
        if self._cache.recurrent is not None:
            self._cache.recurrent.poison(rows)


def _poison_end(cache: KVCache, block_ids: Sequence[int], num_entries: int) -> None:
    """What blocks have behind so many entries."""
    first, offset = divmod(num_entries, cache.block_size)
    for block in block_ids[first:]:
        cache.poison(block, offset)
        offset = 0
