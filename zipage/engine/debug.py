"""Checks after every step, and NaN in all memory that holds nothing valid."""

from __future__ import annotations

from collections.abc import Iterable
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
        self._poisoned = set(scheduler.pool.unindexed_free_blocks())
        cache.poison(slice(None))
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
            first, offset = divmod(request.cache_len, size)
            for block in request.block_ids[first:]:
                self._cache.poison(block, offset)
                offset = 0

    def after(self) -> None:
        """Check pool, tables and rows; poison free blocks that no prefix refers to.

        Raises:
            RuntimeError: an invariant is broken.
        """
        self._scheduler.check_integrity()
        dead = set(self._scheduler.pool.unindexed_free_blocks())
        for block in dead - self._poisoned:
            self._cache.poison(block)
        self._poisoned = dead
        self._poison_rows({*range(self._scheduler.max_num_seqs)} - {r.row for r in self._scheduler.running})

    def _poison_rows(self, rows: Iterable[int]) -> None:
        """Those of recurrent layers, where there are any."""
        if self._cache.recurrent is not None:
            self._cache.recurrent.poison(rows)
