"""When a bounded request is compressed next. Only this module answers that."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.compression import Compression, has_window, num_fresh_blocks
from zipage.scheduling.request import Request, Status

PACE = 4
"""Those that reach N_max together are compressed at so many times the rate at which compressions come on average: a
wave of all that run takes a quarter of the steps between two compressions of a request, and later ones come as spread.
With less, more requests stall; with more, a step takes longer (docs/log.md).
"""


class Trigger(ABC):
    """Answers for requests with a rule. Entries are counted as in `Request.cache_len`."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool

    @abstractmethod
    def choose(
        self, running: Sequence[Request], awake: Sequence[Request], in_flight: Collection[Compression],
        num_short: Callable[[], int],
    ) -> list[Request]:  # fmt: skip
        """Which requests to compress now.

        Args:
            running: oldest first.
            awake: of these, all whose last block is full, and others.
            in_flight: compressions under way.
            num_short: counts the blocks that the pool lacks.
        """

    @abstractmethod
    def is_due(self, request: Request) -> bool:
        """Whether a request whose last block is full must be compressed before its next entry."""

    @abstractmethod
    def is_deferred(self, request: Request) -> bool:
        """Whether a request that is due was passed over by `choose` the last time, since others come before it."""

    @abstractmethod
    def most_entries(self, request: Request) -> int:
        """Entries that the request holds at most when its next compression comes."""

    @abstractmethod
    def fewest_entries(self, request: Request) -> int:
        """Entries that the request holds at least when its next compression comes."""

    @abstractmethod
    def blocks_to_expect(self, request: Request) -> int:
        """Blocks up to which the table of a running request will grow, so that room should be kept for it."""

    @abstractmethod
    def is_in_window(self, request: Request, num_entries: int, num_blocks: int) -> bool:
        """Whether the next compression reads the query of the entry after `num_entries`, in a table of `num_blocks`."""

    def has_come_to_window(self, request: Request) -> bool:
        """Whether a request that decodes has come to its window: its next compression reads the query of its next
        entry, or comes before that.
        """
        num_blocks = len(request.block_ids)
        is_full = request.cache_len == num_blocks * self.pool.block_size
        if is_full and self.is_due(request):
            return True
        return self.is_in_window(request, request.cache_len, num_blocks + is_full)


class BlockFull(Trigger):
    """As soon as no further entry fits without a block beyond N_max, and no more at once than `PACE` allows.

    A request that is passed over stalls, so it is compressed as it would be alone, only later. Those of N_max blocks go
    by age; those of more, after a long prompt, hold what others may want and are never passed over.
    """

    def __init__(self, pool: BlockPool) -> None:
        super().__init__(pool)
        self._deferred: set[Request] = set()

    def choose(
        self, running: Sequence[Request], awake: Sequence[Request], in_flight: Collection[Compression],
        num_short: Callable[[], int],
    ) -> list[Request]:  # fmt: skip
        size = self.pool.block_size
        full = [r for r in awake if r.rule is not None and r.cache_len == len(r.block_ids) * size]
        due = [r for r in full if r.status is Status.RUNNING and self.is_due(r) and not r.has_all_tokens]
        self._deferred.clear()
        if len(due) > 1:
            at_bound = [request for request in due if len(request.block_ids) == request.rule.max_blocks]
            self._deferred.update(at_bound[self._most_at_once(running) :])
        return [request for request in due if request not in self._deferred] if self._deferred else due

    def _most_at_once(self, running: Sequence[Request]) -> int:
        """Requests of N_max blocks that are compressed behind one step."""
        size = self.pool.block_size
        rate = sum(1 / (r.rule.budget.interval_blocks * size) for r in running if r.rule is not None)
        return math.ceil(PACE * rate)

    def is_due(self, request: Request) -> bool:
        return len(request.block_ids) >= request.rule.max_blocks

    def is_deferred(self, request: Request) -> bool:
        return request in self._deferred

    def most_entries(self, request: Request) -> int:
        size, blocks = self.pool.block_size, request.rule.max_blocks
        if request.num_compressions == 0:
            # A long prompt is computed whole.
            blocks = max(blocks, -(-request.num_prompt_tokens // size))
        return blocks * size

    def fewest_entries(self, request: Request) -> int:
        return self.most_entries(request)

    def blocks_to_expect(self, request: Request) -> int:
        return request.rule.max_blocks

    def is_in_window(self, request: Request, num_entries: int, num_blocks: int) -> bool:
        if num_blocks < request.rule.max_blocks:
            return False
        return num_blocks * self.pool.block_size - num_entries <= request.rule.window


class Pressure(Trigger):
    """When the pool lacks blocks: those who are most over their budget first, as many as it takes."""

    def choose(
        self, running: Sequence[Request], awake: Sequence[Request], in_flight: Collection[Compression],
        num_short: Callable[[], int],
    ) -> list[Request]:  # fmt: skip
        num_missing = num_short()
        num_missing -= sum(len(other.block_ids) - other.request.rule.kept_blocks for other in in_flight)
        if num_missing <= 0:
            return []
        able = [request for request in running if self._is_able(request)]
        able.sort(key=lambda request: request.rule.keep - request.cache_len)
        chosen = []
        for request in able:
            gain = len(request.block_ids) - request.rule.kept_blocks - num_fresh_blocks(request, self.pool)
            if gain > 0:
                chosen.append(request)
                num_missing -= gain
                if num_missing <= 0:
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
            and has_window(request)
        )

    def is_due(self, request: Request) -> bool:
        return False

    def is_deferred(self, request: Request) -> bool:
        return False

    def most_entries(self, request: Request) -> int:
        return self.pool.num_blocks * self.pool.block_size

    def fewest_entries(self, request: Request) -> int:
        return max(request.rule.keep + 1, request.num_tokens)

    def blocks_to_expect(self, request: Request) -> int:
        return 0

    def is_in_window(self, request: Request, num_entries: int, num_blocks: int) -> bool:
        return False


TRIGGERS: dict[str, type[Trigger]] = {"block_full": BlockFull, "pressure": Pressure}
"""By the name of the option."""
