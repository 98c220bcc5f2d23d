"""What an engine reports: a record of every step, of every event of a request's cache, and counters."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from zipage.scheduling.batch import Batch
from zipage.scheduling.compression import Compressed
from zipage.scheduling.request import Request
from zipage.scheduling.scheduler import Scheduler
from zipage.stats import EngineStats, EventStats, StepStats

logger = logging.getLogger(__name__)


class Listeners:
    """Those who get the records of steps and events.

    Records are made within a step and handed out after it (`deliver`), so that no listener can come between its parts.

    Args:
        strict: a listener's exception is raised, instead of logged.

    Attributes:
        steps, events: `LLM.step_listeners` and `LLM.event_listeners`.
    """

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._undelivered: list[tuple[list[Callable], StepStats | EventStats]] = []
        self.steps: list[Callable[[StepStats], None]] = []
        self.events: list[Callable[[EventStats], None]] = []

    def keep(self, record: StepStats | EventStats) -> None:
        """To be delivered."""
        self._undelivered.append((self.steps if isinstance(record, StepStats) else self.events, record))

    def deliver(self) -> None:
        """Hand the records that were made since the last time to their listeners, in order.

        A listener that raises is logged and taken off the list: nothing else suffers from it.
        """
        records, self._undelivered = self._undelivered, []
        for listeners, record in records:
            for listener in listeners.copy():
                try:
                    listener(record)
                except Exception:
                    if self._strict:
                        raise
                    logger.exception("%r raised and gets no further records", listener)
                    listeners.remove(listener)


class Telemetry:
    """Fills the records of `zipage.stats`; `clock` is that of its core, `block_bytes` and
    `sliding_block_bytes` those of a block of each rank.

    Attributes:
        counters: those that the scheduler does not keep itself.
        listeners: get the records.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        block_bytes: int,
        sliding_block_bytes: int = 0,
        strict: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._scheduler = scheduler
        self._block_bytes = block_bytes
        self._sliding_block_bytes = sliding_block_bytes
        self._clock = clock
        self._num_applied = 0
        sliding = scheduler.sliding
        totals = {"sliding_blocks_total": 0 if sliding is None else sliding.pool.num_blocks}
        self.counters = EngineStats(blocks_total=scheduler.pool.num_blocks, **totals)
        self.listeners = Listeners(strict)

    def record_step(self, batch: Batch, num_tokens: int, begin: float, device_time: float) -> None:
        """A step of `num_tokens` new tokens that began at `begin` (host clock) and has just ended."""
        scheduler, counters = self._scheduler, self.counters
        end = self._clock()
        device_time = min(device_time, end - begin)
        num_applied = scheduler.compressions.num_applied
        step = StepStats(
            step=counters.steps,
            time=end,
            num_decode=batch.num_decodes,
            num_prefill=len(batch.prefills),
            prefill_tokens=sum(chunk.num_tokens for chunk in batch.prefills),
            num_preempted=len(batch.preempted),
            num_paused=len(batch.paused),
            num_resumed=len(batch.resumed),
            num_compressed=num_applied - self._num_applied,
            num_compressing=len(scheduler.compressions.in_flight),
            num_stalled=batch.num_stalled,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            query_slots_used=scheduler.slots.num_used,
            blocks_used=scheduler.pool.num_used,
            blocks_cached=scheduler.pool.num_cached,
            blocks_total=scheduler.pool.num_blocks,
            host_time=end - begin - device_time,
            device_time=device_time,
            step_time=end - begin,
        )
        self._num_applied = num_applied
        counters.steps += 1
        counters.output_tokens += num_tokens
        counters.preemptions += len(batch.preempted)
        counters.host_time += step.host_time
        counters.device_time += device_time
        self.listeners.keep(step)

    def record_moves(self, batch: Batch) -> None:
        """The preemptions, pauses and resumptions of a batch."""
        for request, num_entries, num_blocks in batch.preempted:
            self._tell("preempt", request, (num_entries, 0), (num_blocks, 0))
        for request, block_ids, *_ in batch.paused:
            self._tell("pause", request, (request.cache_len, request.cache_len), (len(block_ids), 0))
        for request, block_ids, *_ in batch.resumed:
            self._tell("resume", request, (request.cache_len, request.cache_len), (0, len(block_ids)))

    def record_compression(self, done: Compressed, seconds: float, kept_positions: np.ndarray | None) -> None:
        """A compression that was booked, `seconds` after its order."""
        self._tell(
            "compress",
            done.request,
            (done.entries_before, done.entries_after),
            (done.blocks_before, done.blocks_after),
            round=done.round,
            seconds=seconds,
            kept_positions=kept_positions,
        )

    def _tell(
        self,
        kind: Literal["compress", "pause", "resume", "preempt"],
        request: Request,
        entries: tuple[int, int],
        blocks: tuple[int, int],
        **details: Any,
    ) -> None:
        """`entries`, `blocks`: before and after."""
        if not self.listeners.events:
            return
        event = EventStats(
            kind,
            step=self.counters.steps,
            time=self._clock(),
            request_id=request.request_id,
            sample_index=request.index,
            num_tokens=request.num_tokens,
            entries_before=entries[0],
            entries_after=entries[1],
            blocks_before=blocks[0],
            blocks_after=blocks[1],
            **{"round": request.num_compressions} | details,
        )
        self.listeners.keep(event)

    def stats(self) -> EngineStats:
        """All counters, and gauges as they are now."""
        scheduler, compressions = self._scheduler, self._scheduler.compressions
        swap, sliding_bytes = scheduler.swap_space, self._sliding_block_bytes
        return replace(
            self.counters,
            pauses=scheduler.num_pauses,
            resumes=scheduler.num_resumes,
            bytes_to_host=swap.blocks_out * self._block_bytes + swap.sliding_out * sliding_bytes,
            bytes_from_host=swap.blocks_in * self._block_bytes + swap.sliding_in * sliding_bytes,
            compressions_ordered=compressions.num_ordered,
            compressions_applied=compressions.num_applied,
            compressions_failed=compressions.num_failed,
            entries_evicted=compressions.entries_evicted,
            entries_kept=compressions.entries_kept,
            blocks_returned=compressions.blocks_returned,
            budget_bound=compressions.num_bound,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_compressing=len(compressions.in_flight),
            query_slots_used=scheduler.slots.num_used,
            blocks_used=scheduler.pool.num_used,
            sliding_blocks_used=0 if scheduler.sliding is None else scheduler.sliding.pool.num_used,
        )
