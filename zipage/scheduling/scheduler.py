"""Who runs in the next step, and what becomes of them after it. Pure Python."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from itertools import count
from operator import attrgetter

from zipage.outputs import FinishReason
from zipage.scheduling.batch import Batch, Chunk, Preemption, Swap
from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.compression import Compressed, Compression, num_fresh_blocks
from zipage.scheduling.compression_scheduler import CompressionScheduler
from zipage.scheduling.headroom import HEADROOM, Headroom
from zipage.scheduling.integrity import check_requests
from zipage.scheduling.prefix_lookup import PrefixLookup
from zipage.scheduling.query_slots import QuerySlots
from zipage.scheduling.request import Request, Status
from zipage.scheduling.sliding_blocks import SlidingBlocks
from zipage.scheduling.swap_space import SwapSpace
from zipage.scheduling.triggers import TRIGGERS

AGE = attrgetter("number")


class Scheduler:
    """Continuous batching over a block pool, for requests with and without a bound on their cache.

    A step is `schedule`; `advance`, once what it plans is under way; `order_compressions`, which are completed at once
    or some steps later; and `update` with the tokens that it gave. The order of a batch: every running decode, then
    the rest of prompts already begun, then paused and new requests, within `max_num_batched_tokens`.

    The next step may be planned and advanced before `update`, but no further one: a request decodes on from a token
    whose value is still pending. If that token turns out to end it, what the next step computes for it is dropped.
    Without its blocks or row it waits until its token is known, for then its text is computed again from the host's.

    docs/scheduling.md has the rules: who gets memory and query slots, and why no request starves.
    """

    batch_type, asleep_room = Batch, 0  # other ones in a simulation

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool = True,
        headroom: int = HEADROOM,
        num_query_slots: int = 0,
        trigger: str = "block_full",
        scheduling: str = "hybrid",
        swap_space: SwapSpace | None = None,
        shares_prefixes: bool = True,
        sliding: SlidingBlocks | None = None,
    ) -> None:
        self.pool = pool
        self.sliding = sliding
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.trigger = TRIGGERS[trigger](pool)
        self.compressions = CompressionScheduler(pool, self.trigger)
        self.slots = QuerySlots(num_query_slots, self.trigger, constrained=scheduling == "constrained")
        self.prefixes = PrefixLookup(pool, self.trigger, shares_prefixes, sliding)
        self.headroom = Headroom(pool, self.trigger, self.prefixes, headroom)
        self.swap_space = swap_space or SwapSpace()
        self.num_pauses = self.num_resumes = 0
        self._numbers = count()
        self._rows = list(range(max_num_seqs - 1, -1, -1))

    def add(self, request: Request) -> None:
        request.number = next(self._numbers)
        self.waiting.append(request)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    # Compressions

    def order_compressions(self) -> list[Compression]:
        """Take the requests that are due for a compression out of the batch.

        After `advance`, so that a compression is launched behind the step that filled the last block and its request
        misses none; where a step is empty, without.
        """
        begun = self.compressions.order(self.running, self._awake(), self._num_short)
        for compression in begun:
            compression.request.status = Status.COMPRESSING
        return begun

    def complete(self, number: int, kept: Sequence[int] | None = None) -> Compressed:
        """Book a compression that is done; see `CompressionScheduler.complete`."""
        done = self.compressions.complete(number, kept)
        request = done.request
        request.hold(done.block_ids)
        request.cache_len = request.rule.keep
        request.status = Status.RUNNING
        self.prefixes.cut(request, request.rule.pinned_blocks)
        if request.finish_reason is not None:
            self._finish([request], request.finish_time)
        return done

    def fail_compression(self, number: int, error: str, now: float = 0.0) -> list[Request]:
        """End the request of a compression that came to nothing; `error` says why.

        Returns:
            The request, unless it had ended before.
        """
        request = self.compressions.fail(number)
        request.status = Status.RUNNING
        if request.finish_reason is not None:
            self._finish([request], request.finish_time)
            return []
        self.fail(request, error, now)
        return [request]

    def fail(self, request: Request, error: str, now: float = 0.0) -> None:
        """End a request whose entries are lost; `error` says why."""
        request.error = error
        self.finish([request], "error", now)

    def _num_short(self) -> int:
        head = self.waiting[0] if self.waiting and len(self.running) < self.max_num_seqs else None
        return self.headroom.num_short(self.running, head)

    # Planning

    def _awake(self) -> list[Request]:
        """Running requests to look at, oldest first: a simulation leaves others alone."""
        return self.running

    def schedule(self, now: float = 0.0) -> Batch:
        """Plan one step and take the blocks it needs. `now` (seconds) stamps requests scheduled for the first time."""
        batch = self.batch_type(slides=self.sliding is not None)
        self.slots.assign(self.running)
        unfinished, may_admit = self._schedule_decodes(batch)
        budget = self.max_num_batched_tokens - batch.num_decodes
        for request in unfinished:
            if budget <= 0:
                break
            budget -= self._add_chunk(batch, request, budget)
        if may_admit:
            self._admit(batch, budget, now)
        return batch

    def _schedule_decodes(self, batch: Batch) -> tuple[list[Request], bool]:
        """Fill `batch.decodes`, making room as needed.

        Returns:
            Running requests whose prompt is unfinished, and whether others may be admitted: not while somebody waits
            for blocks, which they would take, or share and so make the compression of their holder need more.
        """
        unfinished, reserved, may_admit = [], 0, True
        running, pool, size, sliding = self.running, self.pool, self.pool.block_size, self.sliding
        for request in self._awake().copy():
            if request.status is not Status.RUNNING or request.has_all_tokens:
                continue
            if len(request.token_ids) - request.num_computed != 1:
                unfinished.append(request)
                continue
            is_full = request.cache_len == len(request.block_ids) * size
            if request.rule is not None:
                if is_full and self.trigger.is_due(request):
                    if self.trigger.is_deferred(request):
                        batch.num_stalled += 1
                        continue
                    self._make_room(batch, request, reserved, to_compress=True)
                    if request.status is Status.RUNNING:
                        reserved += num_fresh_blocks(request, pool)
                        may_admit = False
                        batch.num_stalled += 1
                    continue
                if request.query_slot < 0 and request.rule.window and self.trigger.has_come_to_window(request):
                    self.slots.lend(request, running)
                    if request.query_slot < 0:
                        batch.num_stalled += 1
                        continue
            if is_full:
                if not self._make_room(batch, request, reserved):
                    if request.status is Status.RUNNING:
                        reserved += 1
                        may_admit = False
                        batch.num_stalled += 1
                    continue
                request.grow(pool.allocate(1))
            if sliding is not None:
                sliding.extend(request, 1)
            batch.decodes.append(request)
        batch.sampled = batch.decodes.copy()
        return [request for request in unfinished if request.status is Status.RUNNING], may_admit

    def _needs_slot(self, request: Request, num_entries: int, num_blocks: int) -> bool:
        """Whether a request that holds so much once it has entered must have a query slot by then."""
        if not self.slots.wanted_by(request):
            return False
        return self.slots.constrained or self.trigger.is_in_window(request, num_entries, num_blocks)

    def _make_room(self, batch: Batch, request: Request, reserved: int, to_compress: bool = False) -> bool:
        """Free a block, or those of a compression, beside the `reserved` ones, at the cost of younger requests.

        Every request that goes may leave blocks behind that only `request` still holds, so that it needs fewer.

        Returns:
            Whether they are free now. If not, a compression under way or a request at its end will return some, or
            `request` was the youngest itself and has left.
        """
        pool = self.pool
        while pool.num_free < reserved + (num_fresh_blocks(request, pool) if to_compress else 1):
            if self.compressions.in_flight or any(other.has_all_tokens for other in self._awake()):
                return False
            victim = self._find_victim(request)
            # A bounded one that leaves of itself may lack queries of its window; computed again, it has them.
            self._evict_request(batch, victim or request, may_copy=victim is not None or request.rule is None)
            if victim is None:
                return False
        return True

    def _find_victim(self, request: Request) -> Request | None:
        """The youngest running request, if it is younger than `request`."""
        for other in reversed(self.running):
            if other.number <= request.number:
                return None
            if other.status is Status.RUNNING:
                return other
        return None

    def _add_chunk(self, batch: Batch, request: Request, budget: int) -> int:
        remaining = self.prefixes.num_to_compute(request) - request.num_computed
        num_tokens = min(remaining, budget)
        if self.sliding is not None:
            num_tokens = self.sliding.extend(request, num_tokens)
        batch.prefills.append(Chunk(request, num_tokens))
        if request.num_computed + num_tokens == request.num_tokens:
            batch.sampled.append(request)
        return num_tokens

    def _admit(self, batch: Batch, budget: int, now: float) -> None:
        self.slots.assign(self.running)
        held_back = []
        room = self.headroom.of_all(self._awake()) + self.asleep_room if self.waiting else 0
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if request.num_pending:
                break
            if request.status is Status.PAUSED:
                if not self._resume(batch, request, room):
                    break
                room += self.headroom.of(request)
                continue
            prefix = self.prefixes.find(request)
            if prefix is None:
                held_back.append(self.waiting.popleft())
                continue
            num_entries = self.prefixes.num_to_compute(request)
            num_blocks = -(-num_entries // self.pool.block_size)
            if num_entries - prefix.num_cached > budget and not self.enable_chunked_prefill:
                break
            needs_slot = self._needs_slot(request, num_entries, num_blocks)
            if needs_slot and not self.slots.can_serve(request, self.running):
                break
            blocks = self.pool.allocate(num_blocks - len(prefix.shared), prefix.shared, room)
            if blocks is None:
                break
            self._enter(batch, request, blocks)
            request.num_computed = request.cache_len = prefix.num_cached
            self.prefixes.adopt(request, prefix)
            self.slots.offer(request)
            if needs_slot and request.query_slot < 0:
                self.slots.lend(request, self.running)
            if request.first_scheduled is None:
                request.first_scheduled = now
                request.cached_tokens = min(prefix.num_cached, request.num_prompt_tokens)
            if prefix.tail is not None:
                batch.copies.append((prefix.tail, blocks[len(prefix.shared)]))
            if self.sliding is not None:
                batch.sliding_copies += self.sliding.adopt(request, prefix.sliding)
            budget -= self._add_chunk(batch, request, budget)
            room += self.headroom.of(request)
        self.waiting.extendleft(reversed(held_back))

    def _enter(self, batch: Batch, request: Request, blocks: list[int]) -> None:
        """The head of the queue begins to run."""
        self.waiting.popleft()
        insort(self.running, request, key=AGE)
        request.status = Status.RUNNING
        request.row = self._rows.pop()
        request.hold(blocks)
        batch.entered.append(request)

    # Preemption, pause and return

    def pause(self, request: Request, batch: Batch) -> None:
        """Move a running request's entries to host memory with `batch`; it returns when there is room."""
        places = request.query_slot, request.row, request.sliding.block_ids
        batch.paused.append(Swap(request, request.block_ids, 0, *places))
        request.queries_saved = request.query_slot >= 0
        self.swap_space.take(request)
        table = request.block_ids
        self._leave(request, Status.PAUSED)
        request.hold(table)
        request.num_pauses += 1
        self.num_pauses += 1

    def _evict_request(self, batch: Batch, request: Request, may_copy: bool = True) -> None:
        """Take a running request's blocks; it goes back to its place in the queue."""
        if request.num_compressions or (may_copy and self.swap_space.prefers_copy(request)):
            self.pause(request, batch)
            return
        batch.preempted.append(Preemption(request, request.cache_len, len(request.block_ids)))
        self._leave(request, Status.WAITING)
        request.num_computed = request.cache_len = 0
        request.num_preemptions += 1

    def _leave(self, request: Request, status: Status) -> None:
        self._release(request)
        self.running.remove(request)
        request.status = status
        place = 0
        while place < len(self.waiting) and self.waiting[place].number < request.number:
            place += 1
        self.waiting.insert(place, request)

    def _resume(self, batch: Batch, request: Request, room: int) -> bool:
        """Give the paused head of the queue its blocks and slot back; its next token and `room` blocks still fit."""
        if request.queries_saved and not self.slots.can_serve(request, self.running):
            return False
        shared = self.prefixes.unchanged_blocks(request)
        blocks = self.pool.allocate_again(request.block_ids, shared, self.headroom.next_block(request) + room)
        if blocks is None:
            return False
        self.swap_space.bring_back(request, len(shared))
        self._enter(batch, request, blocks)
        self.prefixes.cut(request, len(shared))
        self.slots.give_back(request, self.running)
        places = request.query_slot, request.row, () if self.sliding is None else self.sliding.come_back(request)
        batch.resumed.append(Swap(request, blocks, len(shared), *places))
        self.slots.offer(request)
        self.num_resumes += 1
        return True

    def _release(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        self._rows.append(request.row)
        request.row = -1
        request.hold([])
        self.slots.take_back(request)
        if self.sliding is not None:
            self.sliding.release(request)

    # After the step

    def advance(self, batch: Batch) -> None:
        """Book the entries of a planned step; their computation is under way, and its tokens are pending."""
        for request in batch.decodes:
            request.num_computed += 1
            request.cache_len += 1
        for request, num_tokens in batch.prefills:
            request.num_computed += num_tokens
            request.cache_len += num_tokens
            if self.pool.enable_prefix_caching:
                self.prefixes.register(request)
        if self.sliding is not None:
            self.sliding.slide(batch.decodes + [chunk.request for chunk in batch.prefills])
        for token_row, request in enumerate(batch.sampled):
            request.await_token(token_row)

    def update(self, batch: Batch, token_ids: Sequence[int], now: float = 0.0) -> list[Request]:
        """Book the tokens of a step: `token_ids[i]` is that of `batch.sampled[i]`, unless it ended before; -1 where its
        logits were not finite.

        Returns:
            The requests that ended with it: by an end token, by length, or for want of finite logits. They are released
            already, or will be with the completion of the compression that they are in.
        """
        size = self.pool.block_size
        indexed = self.pool.enable_prefix_caching
        finished = []
        for request, token in zip(batch.sampled, token_ids, strict=True):
            if request.finish_reason is not None:
                continue
            if token < 0:
                known = request.num_output_tokens - request.num_pending
                request.error = f"the model's logits for output token {known} are not finite (NaN or infinity)"
                request.finish_reason = "error"
                finished.append(request)
                continue
            is_drawn = request.take_token(token)
            if indexed and request.cache_len // size > len(request.prefix_ids) and request.status is Status.RUNNING:
                self.prefixes.register(request)
            if request.first_token_time is None:
                request.first_token_time = now
            if is_drawn and token in request.stop_ids and not request.follow_ups:
                request.stop_reason = token
                request.finish_reason = "stop"
            elif request.has_all_tokens and not request.num_pending:
                request.finish_reason = request.limit_reason
            elif not (request.is_scripted and is_drawn and request.ends_turn(token)):
                continue
            elif request.follow_ups:
                request.begin_turn(token)
                continue
            else:
                request.finish_reason = "length"
            finished.append(request)
        if finished:
            self._finish(finished, now)
        return finished

    def finish(self, requests: Sequence[Request], reason: FinishReason, now: float = 0.0) -> None:
        """End requests that `update` did not end: a stop string was seen, or the caller withdrew them."""
        for request in requests:
            request.finish_reason = reason
        self._finish(requests, now)

    def _finish(self, requests: Sequence[Request], now: float) -> None:
        was_running = any(request.status is Status.RUNNING for request in requests)
        was_queued = any(request.status in (Status.WAITING, Status.PAUSED) for request in requests)
        for request in requests:
            request.finish_time = now
            request.forget_pending()
            if request.status is Status.COMPRESSING:
                continue
            if request.status is Status.RUNNING:
                self._release(request)
            if request.status is Status.PAUSED:
                self.swap_space.drop(request)
            request.status = Status.FINISHED
        if was_running:
            self.running = [request for request in self.running if request.status is not Status.FINISHED]
        if was_queued:
            self.waiting = deque(request for request in self.waiting if request.status is not Status.FINISHED)

    def take_dropped(self) -> list[int]:
        """Numbers of the requests that ended while they were paused, since the last time."""
        return self.swap_space.take_dropped()

    def check_integrity(self) -> None:
        """Raises RuntimeError where pools, tables, slots and compressions disagree (for tests and debug runs)."""
        check_requests(self.running, self.compressions, self.sliding)
        rows = [request.row for request in self.running]
        if sorted(rows + self._rows) != list(range(self.max_num_seqs)):
            raise RuntimeError("batch rows leaked or were handed out twice")
        self.slots.check_integrity(self.running)
