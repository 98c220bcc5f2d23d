"""Blocks of a fabricated model that notice every wrong read and write."""

from __future__ import annotations

from tests.scheduling.shadow import after
from zipage.scheduling.block_pool import ROOT, BlockPool


class FabricatedMemory:
    """The cells of a pool's blocks: what may be read and written, and poison where nobody may read any more."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.size = pool.block_size
        self.cells: list[list[int | None]] = [[None] * self.size for _ in range(pool.num_blocks)]
        self._poisoned: set[int] = set()
        self._fresh: list[int] = []
        self._prefix_ends = {ROOT: 0}
        self._allocate, self._register = pool.allocate, pool.register
        pool.allocate, pool.register = self._watch_allocate, self._watch_register

    def _watch_allocate(self, num_new, shared=(), reserve=0):
        blocks = self._allocate(num_new, shared, reserve)
        if blocks is not None:
            self._fresh += blocks[len(shared) :]
        return blocks

    def _watch_register(self, block, parent_id, token_ids):
        prefix_id = self._register(block, parent_id, token_ids)
        if prefix_id not in self._prefix_ends or self.pool.is_indexed(block):
            expected, entry = [], self._prefix_ends[parent_id]
            for token in token_ids:
                entry = after(entry, token)
                expected.append(entry)
            self._prefix_ends[prefix_id] = entry
            if self.pool.is_indexed(block):
                assert self.cells[block] == expected, f"the prefix index took block {block}, which holds something else"
        return prefix_id

    def _poison_fresh(self) -> None:
        for block in self._fresh:
            self.cells[block] = [None] * self.size
        self._fresh.clear()

    def _poison_dead(self) -> None:
        """What is free and not indexed can never be read again."""
        dead = set(self.pool.unindexed_free_blocks())
        for block in dead - self._poisoned:
            self.cells[block] = [None] * self.size
        self._poisoned = dead

    def _read(self, table: list[int], n: int) -> list[int | None]:
        entries: list[int | None] = []
        for block in table[: -(-n // self.size)]:
            entries += self.cells[block]
        del entries[n:]
        return entries

    def _assert_writable(self, block: int) -> None:
        assert self.pool.ref_counts[block] == 1, f"wrote into block {block}, which is shared or free"
        assert not self.pool.is_indexed(block), f"wrote into block {block}, which the prefix index finds"
