"""Sliding layers of a fabricated model: what each request sees in its window, and poison where nobody may read."""

from __future__ import annotations

from collections import Counter

from tests.scheduling.shadow import after
from zipage.scheduling.plan import Restore, Save, StepPlan
from zipage.scheduling.request import Request
from zipage.scheduling.scheduler import Scheduler


class FabricatedSliding:
    """Keeps, per slot of the sliding layers' blocks, what the entry in it was computed from.

    Attributes:
        history: of each running or paused request by its number, the entry of each position.
        tables: block by row and place, as the worker has them.
    """

    def __init__(self, scheduler: Scheduler, events: Counter) -> None:
        sliding = scheduler.sliding
        self.pool, self.window, self.size = sliding.pool, sliding.window, sliding.pool.block_size
        self.cells: list[list[int | None]] = [[None] * self.size for _ in range(self.pool.num_blocks)]
        self.history: dict[int, list[int]] = {}
        self.tables: list[dict[int, int]] = [{} for _ in range(scheduler.max_num_seqs)]
        self.host_copies: dict[int, list[list[int | None]]] = {}
        self.events = events
        self._fresh: set[int] = set()
        self._allocate, self._find = self.pool.allocate, sliding.find
        self.pool.allocate, sliding.find = self._watch_allocate, self._watch_find

    def _watch_allocate(self, num_new, shared=(), reserve=0):
        blocks = self._allocate(num_new, shared, reserve)
        self._fresh.update(blocks[len(shared) :])
        return blocks

    def _watch_find(self, prefix_ids):
        found = self._find(prefix_ids)
        self.events["sliding_prefix_cut"] += found.first + len(found.shared) < len(prefix_ids)
        self.events["sliding_prefix_shared"] += len(found.shared) > 0
        return found

    def begin(self, plan: StepPlan) -> None:
        """Moves and tables of a step, but for saves, which come before."""
        for block in self._fresh:
            self.cells[block] = [None] * self.size
        for restore in plan.restores:
            self._restore(restore)
        for source, destination in plan.sliding_copies:
            self._assert_writable(destination)
            self.cells[destination] = self.cells[source].copy()
            self.events["sliding_copies"] += 1
        self._fresh.clear()
        for row, first, block_ids in plan.sliding_tables:
            self.tables[row].update(enumerate(block_ids, first))

    def save(self, save: Save) -> None:
        self.host_copies[save.number] = [self.cells[block].copy() for block in save.sliding_ids]

    def _restore(self, restore: Restore) -> None:
        saved = self.host_copies.pop(restore.number)
        for block, cells in zip(restore.sliding_ids, saved, strict=True):
            assert block in self._fresh, f"wrote into block {block}"
            self.cells[block] = cells

    def forget(self, number: int) -> None:
        """The request is to be computed again, or has ended."""
        self.history.pop(number, None)
        self.host_copies.pop(number, None)

    def compute(self, request: Request, row: int, values: list[int]) -> None:
        """The request's next entries."""
        position, table = request.num_computed, self.tables[row]
        history = self.history.setdefault(request.number, [])
        if not history and position:
            assert not request.num_compressions
            previous = 0
            for token in request.token_ids[:position]:
                previous = after(previous, token)
                history.append(previous)
        assert len(history) == position
        for place, value in enumerate(values, position):
            first = max(0, place - self.window + 1)
            seen = [self.cells[table[p // self.size]][p % self.size] for p in range(first, place)]
            assert seen == history[first:], f"{request}: sees wrong entries in its window"
            block = table[place // self.size]
            self._assert_writable(block)
            self.cells[block][place % self.size] = value
            history.append(value)

    def _assert_writable(self, block: int) -> None:
        assert self.pool.ref_counts[block] == 1, f"wrote into block {block}, which is shared or free"
        assert not self.pool.is_indexed(block), f"wrote into block {block}, which the prefix index finds"

    def poison_dead(self) -> None:
        """What is free and not indexed can never be read again."""
        for block in self.pool.unindexed_free_blocks():
            self.cells[block] = [None] * self.size
