"""Who is compressed, when, and into which blocks. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence

from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.plan import CompressionOrder
from zipage.scheduling.request import Request, Status


class CompressionScheduler:
    """Orders compressions and books them when they are done.

    From its order to its completion a request is out of the batch and keeps the blocks it had, beside the fresh ones
    that its survivors move to where the old ones are shared. What is ordered is completed, or has failed, exactly once.

    Attributes:
        by_pressure: compress only when the pool needs the blocks; otherwise whenever a request's last block is full and
            it owns N_max or more.
        in_flight: ordered and not yet completed.
        num_ordered, num_applied, num_failed: compressions so far.
        entries_evicted, entries_kept: per layer and KV head, over all compressions applied.
        blocks_returned: by which tables became shorter.
        num_bound: requests that were compressed at least once.
    """

    def __init__(self, pool: BlockPool, trigger: str = "block_full") -> None:
        self.pool = pool
        self.by_pressure = trigger == "pressure"
        self.in_flight: list[CompressionOrder] = []
        self.num_ordered = self.num_applied = self.num_failed = 0
        self.entries_evicted = self.entries_kept = 0
        self.blocks_returned = 0
        self.num_bound = 0

    def is_due(self, request: Request) -> bool:
        """Under `block_full`: no further entry fits without a block beyond N_max."""
        held = len(request.block_ids)
        return held >= request.rule.max_blocks and request.cache_len == held * self.pool.block_size

    def first_event(self, request: Request) -> int:
        """Under `block_full`: entries that a request holds at its first compression."""
        size = self.pool.block_size
        return max(request.rule.max_blocks, -(-request.num_prompt_tokens // size)) * size

    def num_fresh(self, request: Request) -> int:
        """Blocks that a compression of the request takes from the pool, since it may not write to shared ones."""
        rule = request.rule
        if rule.drops_blocks:
            return 0
        written = request.block_ids[rule.pinned_blocks : rule.max_blocks - 1]
        return sum(self.pool.ref_counts[block] > 1 for block in written)

    def order(self, running: Sequence[Request], num_short: int = 0) -> list[CompressionOrder]:
        """Take who is due out of the batch.

        Args:
            running: oldest first.
            num_short: blocks that the pool lacks (counts under `pressure` only).
        """
        chosen = self._most_over_budget(running, num_short) if self.by_pressure else self._due(running)
        orders = [self._order(request) for request in chosen]
        return [order for order in orders if order is not None]

    def _due(self, running: Sequence[Request]) -> list[Request]:
        size = self.pool.block_size
        full = [r for r in running if r.rule is not None and r.cache_len == len(r.block_ids) * size]
        return [r for r in full if r.status is Status.RUNNING and self.is_due(r) and not r.has_all_tokens]

    def _most_over_budget(self, running: Sequence[Request], num_short: int) -> list[Request]:
        num_short -= sum(len(order.block_ids) - order.request.rule.max_blocks + 1 for order in self.in_flight)
        if num_short <= 0:
            return []
        able = [request for request in running if self._is_able(request)]
        able.sort(key=lambda request: request.rule.keep - request.cache_len)
        chosen = []
        for request in able:
            gain = len(request.block_ids) - (request.rule.max_blocks - 1) - self.num_fresh(request)
            if gain > 0:
                chosen.append(request)
                num_short -= gain
                if num_short <= 0:
                    break
        return chosen

    def _is_able(self, request: Request) -> bool:
        """Whether an event of this request would evict something now, and could."""
        rule = request.rule
        return (
            rule is not None
            and request.status is Status.RUNNING
            and request.num_tokens - request.num_computed <= 1
            and not request.has_all_tokens
            and request.cache_len > rule.keep
            and request.cache_len % rule.policy.page == 0
            and self._has_window(request)
        )

    def _has_window(self, request: Request) -> bool:
        window = request.rule.window
        if not window:
            return True
        return request.query_slot >= 0 and request.queries_from <= request.num_computed - window

    def _order(self, request: Request) -> CompressionOrder | None:
        """None where the pool lacks the fresh blocks."""
        if not self._has_window(request):
            raise RuntimeError(f"{request}: due for a compression without the queries of its window")
        rule, pool = request.rule, self.pool
        new_ids: list[int] = []
        fresh: list[int] = []
        if not rule.drops_blocks:
            taken = pool.allocate(self.num_fresh(request))
            if taken is None:
                return None
            fresh = taken.copy()
            new_ids = request.block_ids[: rule.max_blocks - 1]
            for place in range(rule.pinned_blocks, len(new_ids)):
                block = new_ids[place]
                if pool.ref_counts[block] > 1:
                    new_ids[place] = taken.pop(0)
                else:
                    pool.forget(block)
        request.note_blocks(len(fresh))
        order = CompressionOrder(request, request.block_ids, new_ids, fresh)
        request.status = Status.COMPRESSING
        self.in_flight.append(order)
        self.num_ordered += 1
        return order

    def complete(self, order: CompressionOrder, kept_blocks: Sequence[int] | None = None) -> None:
        """Book a compression whose survivors lie where they shall, and put the request back into the batch.

        Args:
            kept_blocks: places in `order.block_ids` that stay, ascending, where whole blocks are dropped.

        Raises:
            RuntimeError: the order is not in flight.
        """
        self._take(order)
        request, rule = order.request, order.request.rule
        new_ids = order.new_ids
        if rule.drops_blocks:
            if kept_blocks is None or len(kept_blocks) != rule.max_blocks - 1:
                raise RuntimeError(f"{request}: {kept_blocks} blocks kept, {rule.max_blocks - 1} wanted")
            new_ids = [order.block_ids[place] for place in kept_blocks]
        staying = set(new_ids)
        self.pool.free([block for block in order.block_ids if block not in staying])
        self.num_applied += 1
        self.num_bound += request.rounds == 0
        self.entries_evicted += request.cache_len - rule.keep
        self.entries_kept += rule.keep
        self.blocks_returned += len(order.block_ids) - len(new_ids)
        request.block_ids = new_ids
        request.num_table_written = 0
        request.cache_len = rule.keep
        request.rounds += 1
        del request.prefix_ids[rule.pinned_blocks :]
        request.status = Status.RUNNING

    def fail(self, order: CompressionOrder) -> None:
        """Book a compression that came to nothing. The request has the blocks it had, whatever they hold by now."""
        self._take(order)
        self.pool.free(order.fresh)
        self.num_failed += 1
        order.request.status = Status.RUNNING

    def _take(self, order: CompressionOrder) -> None:
        if order not in self.in_flight:
            raise RuntimeError(f"{order.request}: a compression has ended that is not under way")
        self.in_flight.remove(order)

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
        for order in self.in_flight:
            request = order.request
            if request.status is not Status.COMPRESSING or request.block_ids is not order.block_ids:
                raise RuntimeError(f"{request}: changed while it was being compressed")
            written = order.new_ids[request.rule.pinned_blocks :]
            if any(self.pool.ref_counts[block] != 1 or self.pool.is_indexed(block) for block in written):
                raise RuntimeError(f"{request}: a compression writes to a block that others can see")
