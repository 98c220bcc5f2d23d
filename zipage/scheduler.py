"""Who runs in the next step, and what becomes of them after it. Pure Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from zipage.block_pool import ROOT, BlockPool
from zipage.outputs import FinishReason
from zipage.request import Request, Status


class Chunk(NamedTuple):
    """`num_tokens` tokens of a request's known text to compute, from position `request.num_computed` on."""

    request: Request
    num_tokens: int


class CachedPrefix(NamedTuple):
    """The beginning of a text that is in the cache already.

    Attributes:
        shared: full blocks to share, and `prefix_ids` at their ends.
        num_cached: tokens that they hold together with the copy of `tail`.
        tail: a sibling's last prompt block, not full, to copy; or None.
    """

    shared: list[int]
    prefix_ids: list[int]
    num_cached: int
    tail: int | None


@dataclass(slots=True)
class StepPlan:
    """What one step computes.

    Attributes:
        decodes: running requests that compute their one newest token.
        prefills: chunks of prompts (and of texts that are recomputed after a preemption).
        copies: (source, destination) blocks to copy before the forward pass.
        preempted: requests that lost their blocks to this step.
        sampled: requests that get a token from this step: `decodes`, then prefills that reach the end of their text.
    """

    decodes: list[Request] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    sampled: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.prefills)


class Scheduler:
    """Continuous batching over a block pool.

    Order of a step: every running decode, then the rest of prompts already begun, then new prompts, within
    `max_num_batched_tokens`. A decode that finds no free block preempts the youngest running request, whose text is
    computed again when it returns; it returns before anyone who has not run yet. A prompt is admitted only when the
    pool holds all of it at once and keeps `watermark` of its blocks free for the growth of those that already run.

    No request starves: the queue is first come first served, nobody overtakes its head (only samples that wait for a
    sibling to finish the prompt they share are passed over), the oldest running request is never preempted for another,
    and a request alone in the pool always fits, because longer ones are refused or capped when they are added.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool = True,
        watermark: float = 0.01,
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.reserve = int(watermark * pool.num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._rows = list(range(max_num_seqs - 1, -1, -1))

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self, now: float = 0.0) -> StepPlan:
        """Plan one step and take the blocks it needs. `now` (seconds) stamps requests scheduled for the first time."""
        plan = StepPlan()
        unfinished = self._schedule_decodes(plan)
        budget = self.max_num_batched_tokens - len(plan.decodes)
        for request in unfinished:
            if budget <= 0:
                break
            budget -= self._add_chunk(plan, request, budget)
        self._admit(plan, budget, now)
        return plan

    def _schedule_decodes(self, plan: StepPlan) -> list[Request]:
        """Fill `plan.decodes`, preempting as needed; return the running requests whose prompt is still unfinished."""
        unfinished = []
        running, pool, size = self.running, self.pool, self.pool.block_size
        i = 0
        while i < len(running):
            request = running[i]
            i += 1
            if len(request.token_ids) - request.num_computed != 1:
                unfinished.append(request)
                continue
            if request.cache_len == len(request.block_ids) * size:
                while (new := pool.allocate(1)) is None:
                    victim = running.pop()
                    self._preempt(victim)
                    plan.preempted.append(victim)
                    if victim is request:
                        break
                if new is None:
                    break
                request.block_ids += new
            plan.decodes.append(request)
        plan.sampled = plan.decodes.copy()
        return [request for request in unfinished if request.status is Status.RUNNING]

    def _add_chunk(self, plan: StepPlan, request: Request, budget: int) -> int:
        remaining = request.num_tokens - request.num_computed
        num_tokens = min(remaining, budget)
        plan.prefills.append(Chunk(request, num_tokens))
        if num_tokens == remaining:
            plan.sampled.append(request)
        return num_tokens

    def _admit(self, plan: StepPlan, budget: int, now: float) -> None:
        held_back = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            prefix = self._find_prefix(request)
            if prefix is None:
                held_back.append(self.waiting.popleft())
                continue
            remaining = request.num_tokens - prefix.num_cached
            if remaining > budget and not self.enable_chunked_prefill:
                break
            num_new = -(-request.num_tokens // self.pool.block_size) - len(prefix.shared)
            blocks = self.pool.allocate(num_new, prefix.shared, reserve=self.reserve if self.running else 0)
            if blocks is None:
                break
            self.waiting.popleft()
            self.running.append(request)
            request.status = Status.RUNNING
            request.row = self._rows.pop()
            request.num_table_written = 0
            request.block_ids = blocks
            request.num_computed = request.cache_len = prefix.num_cached
            request.prefix_ids = prefix.prefix_ids
            if request.first_scheduled is None:
                request.first_scheduled = now
                request.cached_tokens = min(prefix.num_cached, request.num_prompt_tokens)
            if prefix.tail is not None:
                plan.copies.append((prefix.tail, blocks[len(prefix.shared)]))
            budget -= self._add_chunk(plan, request, budget)
        self.waiting.extendleft(reversed(held_back))

    def _find_prefix(self, request: Request) -> CachedPrefix | None:
        """What of a request's text the cache holds, or None while a sibling still computes the prompt that both share.

        At least one token is left to compute: the step needs its logits.
        """
        size = self.pool.block_size
        donor = None
        pending = False
        for sibling in request.siblings:
            if sibling is not request and sibling.status is Status.RUNNING:
                if sibling.num_computed >= sibling.num_prompt_tokens:
                    donor = sibling
                    break
                pending = True
        if pending and donor is None:
            return None
        shared, prefix_ids = self.pool.find_prefix(request.token_ids, (request.num_tokens - 1) // size)
        num_cached = request.num_prompt_tokens - 1
        if donor is None or len(shared) * size >= num_cached:
            return CachedPrefix(shared, prefix_ids, len(shared) * size, None)
        full = num_cached // size
        tail = donor.block_ids[full] if num_cached % size else None
        return CachedPrefix(donor.block_ids[:full], donor.prefix_ids[:full], num_cached, tail)

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.status = Status.WAITING
        request.num_computed = request.cache_len = 0
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        self._rows.append(request.row)
        request.row = -1
        request.block_ids = []

    def update(self, plan: StepPlan, token_ids: Sequence[int], now: float = 0.0) -> list[Request]:
        """Book a computed step: `token_ids[i]` is the new token of `plan.sampled[i]`.

        Returns:
            The requests that ended with it, by an end token or by length, already released.
        """
        size = self.pool.block_size
        indexed = self.pool.enable_prefix_caching
        for request in plan.decodes:
            request.num_computed += 1
            request.cache_len += 1
            if indexed and request.cache_len % size == 0:
                self._register(request)
        for request, num_tokens in plan.prefills:
            request.num_computed += num_tokens
            request.cache_len += num_tokens
            if indexed:
                self._register(request)

        finished = []
        for request, token in zip(plan.sampled, token_ids, strict=True):
            request.token_ids.append(token)
            if request.first_token_time is None:
                request.first_token_time = now
            if token in request.stop_ids:
                request.stop_reason = token
                request.finish_reason = "stop"
            elif len(request.token_ids) >= request.max_total_tokens:
                request.finish_reason = request.limit_reason
            else:
                continue
            finished.append(request)
        if finished:
            self._finish(finished, now)
        return finished

    def _register(self, request: Request) -> None:
        size = self.pool.block_size
        prefix_ids = request.prefix_ids
        for i in range(len(prefix_ids), request.cache_len // size):
            tokens = request.token_ids[i * size : (i + 1) * size]
            parent_id = prefix_ids[-1] if prefix_ids else ROOT
            prefix_ids.append(self.pool.register(request.block_ids[i], parent_id, tokens))

    def finish(self, requests: Sequence[Request], reason: FinishReason, now: float = 0.0) -> None:
        """End requests that `update` did not end: a stop string was seen, or the caller withdrew them."""
        for request in requests:
            request.finish_reason = reason
        self._finish(requests, now)

    def _finish(self, requests: Sequence[Request], now: float) -> None:
        was_running = any(request.status is Status.RUNNING for request in requests)
        was_waiting = any(request.status is Status.WAITING for request in requests)
        for request in requests:
            if request.status is Status.RUNNING:
                self._release(request)
            request.status = Status.FINISHED
            request.finish_time = now
        if was_running:
            self.running = [request for request in self.running if request.status is Status.RUNNING]
        if was_waiting:
            self.waiting = deque(request for request in self.waiting if request.status is Status.WAITING)

    def check_integrity(self) -> None:
        """Check the invariants of pool and tables (for tests and debug runs).

        Raises:
            RuntimeError: an invariant is broken; the message says which.
        """
        self.pool.check_integrity([request.block_ids for request in self.running])
        size = self.pool.block_size
        for request in self.running:
            if not request.cache_len <= len(request.block_ids) * size:
                raise RuntimeError(f"{request}: more entries than its blocks hold")
            writable = request.block_ids[request.cache_len // size :]
            if any(self.pool.ref_counts[block] != 1 for block in writable):
                raise RuntimeError(f"{request}: a block it will write into is shared")
        rows = [request.row for request in self.running]
        if sorted(rows + self._rows) != list(range(self.max_num_seqs)):
            raise RuntimeError("batch rows leaked or were handed out twice")
