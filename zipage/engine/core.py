"""The step loop: requests in, tokens out. It knows ids and tokens, and no text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from zipage.engine.debug import DebugChecks
from zipage.engine.interface import Core, TokenDelta
from zipage.engine.request_metrics import request_metrics
from zipage.engine.request_state import request_state
from zipage.engine.telemetry import Telemetry
from zipage.outputs import Logprob
from zipage.scheduling.batch import Batch
from zipage.scheduling.plan import StepPlan
from zipage.scheduling.planner import plan_compression, plan_step
from zipage.scheduling.request import Request, Status
from zipage.scheduling.scheduler import Scheduler
from zipage.stats import EngineStats, HeldEntries, RequestMetrics, Snapshot
from zipage.worker.compression_runner import CompressionResult, CompressionRunner
from zipage.worker.model_runner import Launch, ModelRunner, StepResult
from zipage.worker.sampler import Logprobs


@dataclass(slots=True)
class _UnderWay:
    """A step that was launched at `begin` (host clock) and not booked yet."""

    batch: Batch
    launch: Launch
    begin: float


class EngineCore(Core):
    """Plans steps, runs them, and books the results.

    Args:
        scheduler, runner, compressor, telemetry: its parts, over one cache.
        debug: checks after every step; None for none.
        overlaps: launch a step before the tokens of the one before are waited for.
        async_compression: compressions run beside the steps after them.
        heads: layers of the model, and KV heads of each.
        clock: seconds, of the host or of a simulation.
    """

    scheduler_type = Scheduler

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        compressor: CompressionRunner,
        telemetry: Telemetry,
        debug: DebugChecks | None,
        *,
        overlaps: bool,
        async_compression: bool,
        heads: tuple[int, int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(telemetry.counters, telemetry.listeners)
        self.scheduler = scheduler
        self.runner = runner
        self.compressor = compressor
        self.telemetry = telemetry
        self.debug = debug
        self.overlaps = overlaps
        self._async_compression = async_compression
        self._heads = heads
        self._clock = clock
        self._samples: dict[str, list[Request]] = {}
        """Of each unfinished prompt."""
        self._deltas: list[TokenDelta] = []
        self._under_way: _UnderWay | None = None
        self._step_ended = 0.0

    # Requests

    def add(self, samples: Sequence[Request]) -> None:
        self._samples[samples[0].request_id] = list(samples)
        for sample in samples:
            self.scheduler.add(sample)

    def abort(self, request_id: str) -> list[TokenDelta]:
        live = [r for r in self._samples.get(request_id, ()) if r.finish_reason is None]
        self.scheduler.finish(live, "abort", self._clock())
        self._end(live)
        self._drain()
        return self._take_deltas()

    def stop(self, request_id: str, index: int) -> RequestMetrics:
        request = next(r for r in self._samples[request_id] if r.index == index)
        self.scheduler.finish([request], "stop", self._clock())
        self._forget(request)
        self._drain()
        return request_metrics(request)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._samples)

    def is_unfinished(self, request_id: str, index: int | None = None) -> bool:
        """Whether that sample of a prompt is, or any."""
        samples = self._samples.get(request_id, ())
        return any(r.finish_reason is None and index in (None, r.index) for r in samples)

    # Wholeness

    def _on_device(self) -> AbstractContextManager:
        return on_device(self.runner.device)

    def _give_up(self) -> None:
        self._under_way = None
        self._samples.clear()

    def _close(self) -> None:
        self.compressor.close()

    # What is known of it

    def stats(self) -> EngineStats:
        return replace(self.telemetry.stats(), compressions_misranked=self.compressor.ranks.num_failed)

    @property
    def output_tokens(self) -> int:
        return self.counters.output_tokens

    def logits(self, hidden: Tensor) -> Tensor:
        return self.runner.logits(hidden)

    def snapshot(self) -> Snapshot:
        live = [r for samples in self._samples.values() for r in samples if r.finish_reason is None]
        return Snapshot([request_state(request) for request in live], self.scheduler.pool.num_cached)

    def held_entries(self, request_id: str, index: int) -> HeldEntries | None:
        live = (r for r in self._samples.get(request_id, ()) if r.index == index and r.status is Status.RUNNING)
        request = next(live, None)
        if request is None:
            return None
        if request.num_compressions:
            positions = self.compressor.positions(request.block_ids, request.cache_len)
        else:
            positions = np.broadcast_to(np.arange(request.cache_len, dtype=np.int32), (*self._heads, request.cache_len))
        return HeldEntries(request.num_prompt_tokens, request.num_tokens, positions)

    # A step

    def step(self) -> list[TokenDelta]:
        """Plan and launch a step, and book the one before, or, where steps don't overlap, this one.

        What was booked is returned before more is planned, so that a stop string in it ends its request in time.
        """
        if self._under_way and not self._may_overlap(self._under_way.batch):
            self._end_step()
            if self._deltas:
                self._drain()
                return self._take_deltas()
        if not self.scheduler.has_unfinished:
            return self._take_deltas()
        begin = self._clock()
        batch = self._schedule(begin)
        if batch is not None and not batch.is_empty:
            plan = self._plan(batch)
            lost = self.runner.move(plan)
            self.telemetry.record_moves(batch)
            if lost:
                self._end_lost(batch, lost)
            if self.debug:
                self.debug.before(batch)
            launch = self.runner.launch(plan)
            self.scheduler.advance(batch)
            self._compress()
            if self._under_way:
                self._end_step()
            self._under_way = _UnderWay(batch, launch, begin)
            if not self.overlaps:
                self._end_step()
        self._drain()
        return self._take_deltas()

    def _plan(self, batch: Batch) -> StepPlan:
        return plan_step(batch, self.scheduler.take_dropped())

    def _end_lost(self, batch: Batch, lost: Mapping[int, str]) -> None:
        """End the requests whose entries were lost on the way to host memory or back; `lost`: number -> why."""
        moved = {swap.request.number: swap.request for swap in (*batch.paused, *batch.resumed)}
        for number, error in lost.items():
            self.scheduler.fail(moved[number], error, self._clock())
        self._end([moved[number] for number in lost])

    def _may_overlap(self, batch: Batch) -> bool:
        """Whether the next step may be launched before the host knows this one's tokens."""
        return not any(request.sampling_params.needs_history for request in batch.sampled)

    def _schedule(self, now: float) -> Batch | None:
        """Complete compressions that are done, then schedule a step; waits for the step and the compressions under way
        where nothing else can run. None where nothing is left to do, or deltas came that may end a request.
        """
        scheduler = self.scheduler
        self._complete(self.compressor.poll())
        while True:
            batch = scheduler.schedule(now)
            if not batch.is_empty:
                return batch
            if not scheduler.has_unfinished:
                return None
            if self._under_way:
                self._end_step()
                if self._deltas:
                    return None
                continue
            has_ordered = self._compress()
            ended = self.compressor.poll(wait=True)
            self._complete(ended)
            if not has_ordered and not ended:
                raise RuntimeError(f"nothing can run: {scheduler.running} run, {len(scheduler.waiting)} wait")

    def _end_step(self) -> None:
        """Wait for the step under way and book its tokens."""
        step, self._under_way = self._under_way, None
        result = step.launch.wait()
        now = self._clock()
        num_tokens = self._book(step.batch, result, now)
        if self.debug:
            self.debug.after()
        # With the next step launched already, this one's time is what has passed since the one before it ended.
        begin = max(step.begin, self._step_ended)
        self.telemetry.record_step(step.batch, num_tokens, begin, result.device_time)
        self._step_ended = self._clock()

    def _compress(self) -> bool:
        """Begin the compressions that are due. Synchronous ones are in place for whatever is launched after them.

        Returns:
            Whether any were.
        """
        compressions = self.scheduler.order_compressions()
        if compressions:
            self.compressor.submit([plan_compression(compression) for compression in compressions])
            if not self._async_compression:
                self._complete(self.compressor.poll(wait=True))
        return bool(compressions)

    def _drain(self) -> None:
        """Without a prompt to serve there may be no further step: end what is under way, so that its blocks go back."""
        if not self._samples:
            if self._under_way:
                self._end_step()
            self._complete(self.compressor.poll(wait=True))
            self.runner.move(StepPlan(drops=self.scheduler.take_dropped()))
            self.compressor.ranks.poll(wait=True)

    def _complete(self, results: Sequence[CompressionResult]) -> None:
        for result in results:
            if result.error is not None:
                self._end(self.scheduler.fail_compression(result.order.number, result.error, self._clock()))
                continue
            kept = result.kept_pages if result.kept_counts is None else result.kept_counts
            done = self.scheduler.complete(result.order.number, kept)
            self.telemetry.record_compression(done, result.seconds, result.kept_positions)

    def _book(self, batch: Batch, result: StepResult, now: float) -> int:
        """Returns how many tokens the step gave: those of requests that had ended before it are dropped."""
        tokens = result.token_ids
        sampled = [r for r, token in zip(batch.sampled, tokens, strict=True) if r.finish_reason is None and token >= 0]
        if result.logprobs is not None:
            for row, (request, token) in enumerate(zip(batch.sampled, tokens, strict=True)):
                if request.logprobs is not None and request.finish_reason is None and token >= 0:
                    request.logprobs.append(_logprobs(result.logprobs, row, token, request.sampling_params.logprobs))
        if result.hidden is not None:
            for row, (request, token) in enumerate(zip(batch.sampled, tokens, strict=True)):
                if request.hidden_states is not None and request.finish_reason is None and token >= 0:
                    request.hidden_states.append(result.hidden[row].clone())
        finished = self.scheduler.update(batch, tokens, now)
        for request in sampled:
            if request.follow and request.finish_reason is None:
                self._deltas.append(TokenDelta(request.request_id, request.index, *request.take_new()))
        self._end(finished)
        return len(sampled)

    # Deltas

    def _end(self, finished: Iterable[Request]) -> None:
        """The last deltas of requests that have ended."""
        for request in finished:
            tokens, logprobs = request.take_new()
            reasons = request.finish_reason, request.stop_reason, request.error
            hidden = None if not request.hidden_states else torch.stack(request.hidden_states)
            last = *reasons, request_metrics(request), hidden
            self._deltas.append(TokenDelta(request.request_id, request.index, tokens, logprobs, *last))
            self._forget(request)

    def _forget(self, request: Request) -> None:
        if all(sample.finish_reason is not None for sample in request.siblings):
            self._samples.pop(request.request_id, None)

    def _take_deltas(self) -> list[TokenDelta]:
        deltas, self._deltas = self._deltas, []
        return deltas


def _logprobs(logprobs: Logprobs, row: int, token: int, num_top: int) -> dict[int, Logprob]:
    """Of one token: its own first, then the `num_top` most likely ones, by token id."""
    of_token = {token: Logprob(float(logprobs.chosen[row]), int(logprobs.ranks[row]))}
    tops = zip(logprobs.top_ids[row, :num_top].tolist(), logprobs.top[row, :num_top].tolist(), strict=True)
    return of_token | {top: Logprob(value, rank) for rank, (top, value) in enumerate(tops, 1)}


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one, to which streams, events and graphs belong."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
