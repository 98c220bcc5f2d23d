"""A scheduler that leaves a decoding request alone until something happens to it.

Most steps give most requests a token and nothing else. Such a request sleeps: it is only counted, and what it gained
is booked when somebody asks. It wakes for the end of a block or of its output, for its window, when it leaves the pool,
and when it changes how much room is kept for it. All else is the engine's own scheduler, which decides as it would.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zipage.scheduling.batch import Batch
from zipage.scheduling.compression import Compression
from zipage.scheduling.request import PENDING, Request, Status
from zipage.scheduling.scheduler import AGE, Scheduler
from zipage.scheduling.triggers import BlockFull

ALWAYS = 2**62
UNKNOWN = array("i", (PENDING,))


class Steps:
    """Counts the batches that were advanced and those whose tokens are booked. A batch's number is of those before."""

    def __init__(self) -> None:
        self.advanced = self.booked = 0


def _of_entries(name: str) -> property:
    slot = getattr(Request, name)
    read = slot.__get__

    def get(request: SleepingRequest) -> int:
        if request.is_asleep:
            request.catch_up()
        return read(request)

    return property(get, slot.__set__)


def _of_tokens(name: str) -> property:
    slot = getattr(Request, name)
    read = slot.__get__

    def get(request: SleepingRequest) -> Any:
        if request.lags and (request.is_asleep or request.steps.booked > request.booked):
            request.catch_up()
        return read(request)

    return property(get, slot.__set__)


_ENTRIES, _COMPUTED, _PENDING, _TOKENS = (
    getattr(Request, name) for name in ("cache_len", "num_computed", "num_pending", "token_ids")
)


class SleepingRequest(Request):
    """A request whose entries and tokens are booked when they are read.

    Attributes:
        steps: of its scheduler.
        token: the one that it draws every time.
        is_asleep: it is in every batch, and in none's lists.
        lags: something may not be booked.
        wakes: the batch in which it wakes.
        room: `Headroom.of` while it sleeps.
        sampled_in: the latest batch that gives it a token, and `token_time`, when the latest token came that it has.
    """

    __slots__ = (
        *("_advanced", "booked", "is_asleep", "lags", "room", "sampled_in", "steps", "token", "token_time"),
        *("since", "until", "wakes"),
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        self.is_asleep = self.lags = False
        self.sampled_in, self.token_time = -1, 0.0
        super().__init__(*args, **options)

    cache_len = _of_entries("cache_len")
    num_computed = _of_entries("num_computed")
    num_pending = _of_tokens("num_pending")
    token_ids = _of_tokens("token_ids")

    def sleep(self, wakes: int, room: int) -> None:
        """From the batch to be advanced next on."""
        if self.lags:
            self.catch_up()
        if not self.lags:
            self.booked = self.steps.advanced
        self.since, self._advanced, self.until = self.booked, self.steps.advanced, ALWAYS
        self.is_asleep = self.lags = True
        self.wakes, self.room = wakes, room

    def wake(self) -> None:
        """The batches before the next one have it still."""
        self.catch_up()
        self.is_asleep, self.until = False, self.steps.advanced
        self.lags = self.booked < self.until
        self.sampled_in = self.until - 1

    def catch_up(self) -> None:
        steps, tokens, pending = self.steps, _TOKENS.__get__(self), _PENDING.__get__(self)
        if self.is_asleep and (count := steps.advanced - self._advanced):
            self._advanced += count
            _COMPUTED.__set__(self, _COMPUTED.__get__(self) + count)
            _ENTRIES.__set__(self, _ENTRIES.__get__(self) + count)
            tokens.extend(UNKNOWN * count)
            pending += count
        count = min(steps.booked, self.until) - self.booked
        if count > 0:
            self.booked += count
            first = len(tokens) - pending
            tokens[first : first + count] = array("i", (self.token,)) * count
            pending -= count
        _PENDING.__set__(self, pending)
        self.lags = self.is_asleep or self.booked < self.until

    def lacks_token_of(self, batch: SleepingBatch) -> bool:
        """Whether the batch gives it a token that is not booked, without having it in a list."""
        return self.lags and self.booked <= batch.number < self.until

    def drop_pending(self) -> None:
        """It has ended; what is under way for it is not booked any more."""
        if self.lags:
            self.catch_up()
            self.lags = False


@dataclass(slots=True, eq=False)
class SleepingBatch(Batch):
    """A batch with requests that sleep.

    Attributes:
        number: of batches before it.
        num_asleep: requests that decode in it beside `decodes`.
        num_heard: of these, the ones that have not ended before they got their token.
    """

    number: int = 0
    num_asleep: int = 0
    num_heard: int = 0

    @property
    def num_decodes(self) -> int:
        return len(self.decodes) + self.num_asleep


class SleepingScheduler(Scheduler):
    """Plans as `Scheduler` does.

    Attributes:
        tokens: that requests draw, each the same one again and again.
        may_sleep: whether anybody may.
        booked_at: when the latest batch was booked.
    """

    batch_type = SleepingBatch

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps = Steps()
        self.tokens: Sequence[int] = ()
        self.may_sleep = True
        self.booked_at = 0.0
        self.num_asleep = 0
        self._is_predictable = isinstance(self.trigger, BlockFull) and self.sliding is None
        self._up: list[SleepingRequest] = []
        """Running requests that are awake, oldest first."""
        self._wakes: dict[int, list[SleepingRequest]] = {}
        self._lagging: list[SleepingRequest] = []
        self._unbooked: deque[SleepingBatch] = deque()
        self._entries = self._squares = self.asleep_room = 0
        """Of those that sleep; entries less the number of the batch, for each; squared too."""

    def add(self, request: SleepingRequest) -> None:
        super().add(request)
        request.steps = self.steps
        indexed = self.pool.enable_prefix_caching
        request.token = self.tokens[request.number % len(self.tokens) if indexed else 0]

    @property
    def asleep_entries(self) -> int:
        """Entries that those asleep hold."""
        return self._entries + self.num_asleep * self.steps.advanced

    @property
    def asleep_reads(self) -> tuple[int, int]:
        """Entries that those asleep read in the coming step, and their squares, each summed over them."""
        now = self.steps.advanced + 1
        squares = self._squares + (2 * self._entries + self.num_asleep * now) * now
        return self._entries + self.num_asleep * now, squares

    # What the scheduler looks at

    def _awake(self) -> list[SleepingRequest]:
        return self._up

    def schedule(self, now: float = 0.0) -> SleepingBatch:
        self._wake_due()
        return super().schedule(now)

    def _schedule_decodes(self, batch: SleepingBatch) -> tuple[list[Request], bool]:
        found = super()._schedule_decodes(batch)
        if self.may_sleep and self._is_predictable:
            batch.decodes = [request for request in batch.decodes if not self._sleeps(request)]
            batch.sampled = batch.decodes.copy()
        batch.number = self.steps.advanced
        batch.num_asleep = batch.num_heard = self.num_asleep
        return found

    def order_compressions(self) -> list[Compression]:
        self._wake_due()
        return super().order_compressions()

    # Who sleeps

    def _sleeps(self, request: SleepingRequest) -> bool:
        """Send a request of the coming batch to sleep, if it has nothing else to do there."""
        count = self._quiet_steps(request)
        if count <= 0:
            return False
        del self._up[bisect_left(self._up, request.number, key=AGE)]
        wakes, room = self.steps.advanced + count, self.headroom.of(request)
        self.num_asleep += 1
        self._count(request.cache_len - self.steps.advanced, 1)
        self.asleep_room += room
        request.sleep(wakes, room)
        self._wakes.setdefault(wakes, []).append(request)
        return True

    def _quiet_steps(self, request: SleepingRequest) -> int:
        """Steps from the coming one on that give a decode a token and nothing else."""
        if (
            request.first_token_time is None
            or request.sampled_in != self.steps.advanced - 1
            or request.follow
            or request.is_scripted
            or request.sampling_params.needs_history
            or request.token in request.stop_ids
        ):
            return 0
        size, entries, rule = self.pool.block_size, request.cache_len, request.rule
        num_tokens, most = len(request.token_ids), request.max_total_tokens
        left = len(request.block_ids) * size - entries
        quiet = min(left, most - num_tokens - 1)
        if self.pool.enable_prefix_caching and not request.num_compressions:
            if entries // size > len(request.prefix_ids):
                return 0
            quiet = min(quiet, left - 2)  # a block is registered in the step before the one that fills it
        if rule is not None and rule.window and len(request.block_ids) >= rule.max_blocks:
            until_window = left - rule.window
            if until_window > 0:
                quiet = min(quiet, until_window)
            elif request.query_slot < 0:
                return 0
        ahead = num_tokens + self.headroom.num_entries
        if ahead < most - 1:  # the room that is kept for it grows with it
            entries += ahead - request.num_computed
            blocks = -(-entries // size)
            if rule is None or blocks < self.trigger.blocks_to_expect(request):
                quiet = min(quiet, blocks * size - entries + 1)
        return quiet

    def _wake_due(self) -> None:
        number = self.steps.advanced
        for request in self._wakes.pop(number, ()):
            if request.is_asleep and request.wakes == number:
                self._wake(request)

    def _wake(self, request: SleepingRequest) -> None:
        request.wake()
        if self.steps.booked > request.since:
            request.token_time = self.booked_at
        if request.lags:
            self._lagging.append(request)
        insort(self._up, request, key=AGE)
        self.num_asleep -= 1
        self._count(_ENTRIES.__get__(request) - self.steps.advanced, -1)
        self.asleep_room -= request.room

    def _count(self, entries: int, sign: int) -> None:
        self._entries += sign * entries
        self._squares += sign * entries * entries

    # Who comes and goes

    def _enter(self, batch: Batch, request: SleepingRequest, blocks: list[int]) -> None:
        super()._enter(batch, request, blocks)
        insort(self._up, request, key=AGE)

    def _leave(self, request: SleepingRequest, status: Status) -> None:
        if request.is_asleep:
            self._wake(request)
        super()._leave(request, status)
        self._up.remove(request)

    def _finish(self, requests: Sequence[SleepingRequest], now: float) -> None:
        for request in requests:
            if request.is_asleep:
                self._wake(request)
            for batch in self._unbooked:
                batch.num_heard -= request.lacks_token_of(batch)
            request.drop_pending()
            if request.status is Status.RUNNING:
                self._up.remove(request)
        super()._finish(requests, now)

    # After the step

    def advance(self, batch: SleepingBatch) -> None:
        super().advance(batch)
        for request in batch.sampled:
            request.sampled_in = batch.number
        self.steps.advanced += 1
        self._unbooked.append(batch)

    def update(self, batch: SleepingBatch, token_ids: Sequence[int], now: float = 0.0) -> list[Request]:
        finished: list[Request] = super().update(batch, token_ids, now)
        for request in batch.sampled:
            request.token_time = now
        self._unbooked.popleft()
        self.steps.booked += 1
        self.booked_at = now
        for request in self._lagging:
            if not request.is_asleep:
                request.token_time = now
        self._lagging = [r for r in self._lagging if r.until > self.steps.booked and not r.is_asleep]
        return finished
