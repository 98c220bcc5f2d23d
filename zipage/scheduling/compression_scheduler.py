"""Orders compressions and books them when they are done. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.compression import Compressed, Compression, has_window, num_fresh_blocks
from zipage.scheduling.request import Request, Status
from zipage.scheduling.triggers import Trigger
from zipage.tile_table import num_blocks


class CompressionScheduler:
    """Orders the compressions that its trigger chooses, and books them when they are done.

    From its order to its completion a request is out of the batch and keeps the blocks it had, beside the fresh ones
    that its survivors move to where the old ones are shared. What is ordered is completed, or has failed, exactly once.

    Attributes:
        trigger: who is compressed, and when.
        in_flight: ordered and not yet completed, by number.
        num_ordered, num_applied, num_failed: compressions so far.
        entries_evicted, entries_kept: per layer and KV head, over all compressions applied.
        blocks_returned: by which tables became shorter.
        num_bound: requests that were compressed at least once.
    """

    def __init__(self, pool: BlockPool, trigger: Trigger) -> None:
        self.pool = pool
        self.trigger = trigger
        self.in_flight: dict[int, Compression] = {}
        self.num_ordered = self.num_applied = self.num_failed = 0
        self.entries_evicted = self.entries_kept = 0
        self.blocks_returned = 0
        self.num_bound = 0
        self._numbers = count()

    def order(
        self, running: Sequence[Request], awake: Sequence[Request], num_short: Callable[[], int]
    ) -> list[Compression]:
        """Take the requests that the trigger chooses out of the batch; arguments as in `Trigger.choose`."""
        chosen = self.trigger.choose(running, awake, self.in_flight.values(), num_short)
        begun = [self._order(request) for request in chosen]
        return [compression for compression in begun if compression is not None]

    def _order(self, request: Request) -> Compression | None:
        """None where the pool lacks the fresh blocks."""
        if not has_window(request):
            raise RuntimeError(f"{request}: due for a compression without the queries of its window")
        rule, pool = request.rule, self.pool
        new_ids: list[int] = []
        fresh: list[int] = []
        if not rule.cuts_table:
            taken = pool.allocate(num_fresh_blocks(request, pool))
            if taken is None:
                return None
            fresh = taken.copy()
            new_ids = request.block_ids[: rule.kept_blocks]
            for place in range(rule.pinned_blocks, len(new_ids)):
                block = new_ids[place]
                if pool.ref_counts[block] > 1:
                    new_ids[place] = taken.pop(0)
                else:
                    pool.forget(block)
        request.note_fresh(len(fresh))
        compression = Compression(next(self._numbers), request, request.block_ids, new_ids, fresh)
        self.in_flight[compression.number] = compression
        self.num_ordered += 1
        return compression

    def complete(self, number: int, kept: Sequence[int] | None = None) -> Compressed:
        """Book a compression whose survivors lie where they shall; its request may go on with what is returned.

        Args:
            number: of the order.
            kept: where whole blocks are dropped, the places in its `block_ids` that stay, ascending; where budgets are
                unequal, the entries that each layer and KV head holds now.

        Raises:
            RuntimeError: it is not in flight.
        """
        compression = self._take(number)
        request, rule = compression.request, compression.request.rule
        size_before, entries_after = num_blocks(compression.block_ids), rule.keep
        if rule.allocation is not None:
            new_ids, left = compression.block_ids.cut(kept, rule.keep, self.pool.block_size)
            entries_after = round(sum(kept) / len(kept))
        else:
            new_ids = compression.new_ids
            if rule.drops_blocks:
                if kept is None or len(kept) != rule.kept_blocks:
                    raise RuntimeError(f"{request}: {kept} blocks kept, {rule.kept_blocks} wanted")
                new_ids = [compression.block_ids[place] for place in kept]
            staying = set(new_ids)
            left = [block for block in compression.block_ids if block not in staying]
        self.pool.free(left)
        lens, sizes = (request.cache_len, entries_after), (size_before, num_blocks(new_ids))
        done = Compressed(request, request.num_compressions, *lens, *sizes, new_ids)
        self.num_applied += 1
        self.num_bound += done.round == 0
        self.entries_evicted += done.entries_before - done.entries_after
        self.entries_kept += done.entries_after
        self.blocks_returned += done.blocks_before - done.blocks_after
        request.num_compressions += 1
        return done

    def fail(self, number: int) -> Request:
        """Book a compression that came to nothing. The request has the blocks it had, whatever they hold by now."""
        compression = self._take(number)
        self.pool.free(compression.fresh)
        self.num_failed += 1
        return compression.request

    def _take(self, number: int) -> Compression:
        compression = self.in_flight.pop(number, None)
        if compression is None:
            raise RuntimeError(f"compression {number} has ended, and it is not under way")
        return compression

    def check_integrity(self) -> None:
        """Check what is in flight (for tests and debug runs).

        Raises:
            RuntimeError: a compression would write to a block that others see, or its books are wrong.
        """
        if self.num_ordered != self.num_applied + self.num_failed + len(self.in_flight):
            raise RuntimeError(
                f"{self.num_ordered} compressions ordered, {self.num_applied} applied, {self.num_failed} failed, "
                f"{len(self.in_flight)} in flight"
            )
        for compression in self.in_flight.values():
            request = compression.request
            if request.status is not Status.COMPRESSING or request.block_ids is not compression.block_ids:
                raise RuntimeError(f"{request}: changed while it was being compressed")
            written = [] if request.rule.cuts_table else compression.new_ids[request.rule.pinned_blocks :]
            if any(self.pool.ref_counts[block] != 1 or self.pool.is_indexed(block) for block in written):
                raise RuntimeError(f"{request}: a compression writes to a block that others can see")
