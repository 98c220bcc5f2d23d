"""Compressions, in the step that orders them or beside the steps after it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from traceback import walk_tb
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.attention_form import AttentionForm
from zipage.eviction.fault import FAULTS, described, files_of, place_in, relative
from zipage.eviction.policy import Policy
from zipage.models.shard import WHOLE, PeerFailed, Shard
from zipage.models.spec import ModelSpec
from zipage.scheduling.plan import CompressionOrder
from zipage.tile_table import TileTable
from zipage.transfer import to_device
from zipage.worker.compression_batch import CompressionBatch, batch_of, batches, check_orders
from zipage.worker.compression_rest import Rest, first_layer_of, rests
from zipage.worker.compressor import PartlyCompressed, choose, compress
from zipage.worker.kv_cache import KVCache
from zipage.worker.output_norms import OutputNorms
from zipage.worker.paged_event import PagedEvent
from zipage.worker.rank_watch import RankWatch
from zipage.worker.tile_batch import TileBatch
from zipage.worker.tile_compression import TileCompressor

logger = logging.getLogger(__name__)


@cache
def compression_stream(device: torch.device) -> torch.cuda.Stream:
    """The one of all compressions beside steps: libraries keep memory for each stream that they see, which the memory
    plan has seen then.
    """
    return torch.cuda.Stream(device)


@dataclass(frozen=True, eq=False)
class CompressionResult:
    """A compression that is done, or that failed.

    Attributes:
        order: what was ordered.
        error: None, or one line that says why it failed; the blocks of its request then hold nothing usable.
        kept_pages: places in `order.block_ids` that stay, ascending, where the policy drops blocks; else None.
        kept_counts: int64 [L * H], entries that each layer and KV head holds, where budgets are unequal; else None.
        kept_positions: int32 [L, H, k], logical positions of the survivors, ascending, where traced; else None. Where
            budgets are unequal, -1 past a head's own.
        seconds: from `submit` until the host saw it done.
    """

    order: CompressionOrder
    kept_pages: list[int] | None
    kept_positions: np.ndarray | None
    seconds: float
    error: str | None = None
    kept_counts: np.ndarray | None = None


class CompressionRunner:
    """Takes orders with `submit` and hands out what is done with `poll`.

    Synchronous, a compression is queued on the current stream before `submit` returns, and the next `poll` hands it out
    without waiting for the GPU: whatever is queued after it finds the survivors in place. Asynchronous on CUDA, one
    worker thread queues it on a stream of its own, and `poll` hands it out once the GPU is through with it; until then
    its request must sit out, keep its blocks, and not be changed. Orders that come while the worker is busy go in one
    batch together: what a batch costs beside its requests would otherwise hold up ever more of them. On a CPU both
    compute in `submit`; there, an asynchronous one is not handed out by the first `poll` after it, so that its request
    sits out a step too.

    A batch that fails goes on request by request, from the first layer that was not moved, with as little memory as can
    be: what one request or the size of the batch brought about costs no other. Only where a move itself fails, and
    what it left behind is unknown, do all requests of the batch fail.

    With the model spread over ranks, the ranks' runners must launch the same batches in the same order, since policies
    may combine heads of all of them. So what is submitted together is launched together and joined with nothing else.
    A batch that fails on one rank has failed on all. What is left of it is launched before the next batch, request by
    request, if all ranks have come equally far, as they have where the policy is at fault; else all of it has failed.

    Args:
        cache: with positions, and with scores and queries where a policy asks for them.
        spec: of the layers and heads in `cache`.
        asynchronous: as above.
        layer_stride: layers of one launch; None takes what a bound on memory allows (`compress`).
        trace: read back the positions that stay, which waits for the GPU.
        debug: fail a compression whose policy ranks an entry NaN, which waits for the GPU; otherwise `ranks` counts it.
        shard: what of the model `cache` holds; its collectives are for the runner alone.
        model_heads: KV heads of a layer of the whole model; None: those of `spec`.
        calibration: of the heads in `cache`, for policies that ask for it (`Event.calibration`).
        outputs: of the heads in `cache`, for policies that ask for them (`Event.output_norms`).
        forms: of each layer's attention; None: they are plain.
    """

    def __init__(
        self,
        cache: KVCache,
        spec: ModelSpec,
        *,
        asynchronous: bool,
        layer_stride: int | None,
        trace: bool,
        debug: bool = False,
        shard: Shard = WHOLE,
        model_heads: int | None = None,
        calibration: Mapping[str, Tensor] | None = None,
        outputs: OutputNorms | None = None,
        forms: Sequence[AttentionForm] | None = None,
    ) -> None:
        self.ranks = RankWatch(strict=debug)
        self._shard = shard
        self._model_heads = model_heads or spec.num_kv_heads
        self._cache = cache
        self._spec = spec
        self._inv_freq = to_device(spec.inv_freq, cache.k.device, np.float64)
        self._calibration = calibration or {}
        self._outputs = outputs
        sinks = [form.sinks for form in forms or () if form.sinks is not None]
        self._sinks = torch.stack(sinks) if sinks else None
        self._layer_stride = layer_stride
        self._tiles = TileCompressor(cache, spec, self._inv_freq, self._calibration, outputs, layer_stride)
        self._trace = trace
        self._delayed = asynchronous and not cache.k.is_cuda
        self._waiting: deque[_Waiting] = deque()
        """Orders that the worker has yet to take."""
        self._tasks: deque[Future[None]] = deque()
        """Of the worker."""
        self._pending: deque[_Job] = deque()
        """What the worker has launched, and `poll` not handed out."""
        self._latest: deque[torch.cuda.Event] = deque(maxlen=2)
        """Behind the worker's last launches."""
        self._num_in_flight = 0
        self._stream = None
        self._logged: set[tuple[type, str | None]] = set()
        self._executor: Executor = _Inline()
        if asynchronous and cache.k.is_cuda:
            self._stream = compression_stream(cache.k.device)
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compression")

    def submit(self, orders: Sequence[CompressionOrder]) -> None:
        """Begin to compress.

        Raises:
            RuntimeError: a request does not meet what its policy needs (`check_orders`).
        """
        if not orders:
            return
        check_orders(orders, self._cache.block_size)
        start, ready = time.perf_counter(), self._recorded()
        waiting = [_Waiting(order, start, ready) for order in orders]
        self._num_in_flight += len(orders)
        if self._shard.is_whole:
            self._waiting.extend(waiting)
            self._tasks.append(self._executor.submit(self._launch_waiting))
        else:
            self._tasks.append(self._executor.submit(self._launch_together, waiting))

    def _recorded(self) -> torch.cuda.Event | None:
        """An event behind what is queued on the current stream, which a compression beside it has to wait for."""
        if self._stream is None:
            return None
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._cache.k.device))
        return ready

    def _launch_waiting(self) -> None:
        """In the worker: launch all that waits, in as few batches as may be.

        Not before the GPU has reached the last batch: what would wait behind it there can as well be joined here.
        """
        if len(self._latest) == 2:
            self._latest[0].synchronize()
        self._launch_together([self._waiting.popleft() for _ in range(len(self._waiting))])

    def _launch_together(self, taken: Sequence[_Waiting]) -> None:
        starts = {waiting.order.number: waiting.start for waiting in taken}
        ready = {waiting.ready: None for waiting in taken}
        for batch in batches([waiting.order for waiting in taken], self._spec, self._cache.block_size):
            self._launch(batch, [starts[order.number] for order in batch.orders], ready, None)

    def _launch(
        self,
        batch: CompressionBatch | TileBatch,
        starts: list[float],
        ready: Iterable[torch.cuda.Event | None],
        rest: Rest | None,
    ) -> None:
        """In the worker: launch a batch behind `ready`, or the rest of it. `starts`: when each order was submitted."""
        job = _Job(batch, starts, self._delayed)
        try:
            if self._stream is None:
                job.kept = self._compress(batch, rest)
            else:
                self._compress_beside(job, ready, rest)
            if not self._shard.is_whole:
                self._shard.collectives.agree()
        except FAULTS as error:
            job.error = error
            if not self._shard.is_whole and self._fail_together(job):
                for order, start, left in zip(batch.orders, starts, rests(len(job.batch.orders), error), strict=True):
                    self._launch(batch_of([order], self._spec, self._cache.block_size), [start], ready, left)
                return
        self._pending.append(job)

    def _fail_together(self, job: _Job) -> bool:
        """Tell the other ranks. Returns whether all have come equally far, so that what is left can be tried again."""
        error = job.error
        first_layer = first_layer_of(error) if job.kept is None else self._spec.num_layers
        place = -1 if first_layer is None else first_layer
        places = self._shard.collectives.fail(place)
        return set(places) == {place} and job.kept is None and rests(len(job.batch.orders), error) is not None

    def poll(self, wait: bool = False) -> list[CompressionResult]:
        """What is done and was not handed out yet, in the order of the launches.

        From here on the current stream sees the survivors in place, and the blocks that were left may be given away.

        Args:
            wait: for everything that was submitted.
        """
        results = []
        while self._next_is_done(wait):
            job = self._pending.popleft()
            if job.done is not None:
                job.done.synchronize()
                torch.cuda.current_stream(self._cache.k.device).wait_event(job.done)
            now = time.perf_counter()
            seconds = [now - start for start in job.starts]
            if job.error is None:
                results += [
                    CompressionResult(order, kept.pages, kept.positions, passed, kept.error, kept.counts)
                    for order, kept, passed in zip(job.batch.orders, job.kept, seconds, strict=True)
                ]
            else:
                results += self._failed(job, job.error, seconds)
        if self._delayed:
            for job in self._pending:
                job.delayed = False
        self.ranks.poll()
        self._num_in_flight -= len(results)
        return results

    def _next_is_done(self, wait: bool) -> bool:
        """Whether there is a job to hand out; raises what is no fault of a computation from the worker."""
        while self._tasks and (wait or self._tasks[0].done()):
            self._tasks.popleft().result()
        return bool(self._pending) and (wait or self._pending[0].is_done)

    def _failed(self, job: _Job, error: BaseException, seconds: list[float]) -> list[CompressionResult]:
        """Go on with the orders of a failed batch, one by one, where that can help; the results where it can't."""
        orders = job.batch.orders
        if self._shard.is_whole and (left := rests(len(job.batch.orders), error)) is not None:
            ready = [self._recorded()]
            for order, start, rest in zip(orders, job.starts, left, strict=True):
                alone = batch_of([order], self._spec, self._cache.block_size)
                self._tasks.append(self._executor.submit(self._launch, alone, [start], ready, rest))
            return []
        policy = job.batch.policy
        cause = error.__cause__ if isinstance(error, PartlyCompressed) else error
        place = _place(policy, cause)
        message = f"a compression under policy {policy.name!r} failed: {described(cause, place)}"
        fault = type(cause), place
        if fault not in self._logged and not isinstance(cause, PeerFailed):  # the same one may come in every request
            self._logged.add(fault)
            logger.error(message, exc_info=error, extra={"in_output": True})
        return [
            CompressionResult(order, None, None, passed, message) for order, passed in zip(orders, seconds, strict=True)
        ]

    def positions(self, table: list[int] | TileTable, num_entries: int) -> np.ndarray:
        """int32 [L, H, num_entries], positions of the first entries of a table, behind what is queued on the current
        stream, for which it waits. The table must not be under compression. Where heads hold unequal lengths,
        `num_entries` is the cache length, and -1 is past a head's own.
        """
        if isinstance(table, TileTable):
            lens = table.lens(num_entries)
            tiles = to_device(table.tiles.clip(0), self._cache.k.device, np.int64)
            rows = self._cache.positions[0, :, 0][tiles].flatten(1)[:, : lens.max()].cpu().numpy()
            rows = np.where(np.arange(rows.shape[1]) < lens[:, None], rows, -1)
            return rows.reshape(self._spec.num_layers, self._spec.num_kv_heads, -1)
        rows = self._cache.positions[:, table].transpose(1, 2).flatten(2)
        return rows[..., :num_entries].cpu().numpy()

    @property
    def in_flight(self) -> int:
        """Orders that were submitted and not handed out."""
        return self._num_in_flight

    def close(self) -> None:
        """Wait for what is under way and forget it."""
        self._executor.shutdown(wait=True)
        if self._stream is not None:
            self._stream.synchronize()
        for forgotten in (self._waiting, self._tasks, self._pending):
            forgotten.clear()
        self._num_in_flight = 0

    def _compress_beside(self, job: _Job, ready: Iterable[torch.cuda.Event], rest: Rest | None) -> None:
        """What it allocates belongs to the worker's own stream, so nothing here is freed under another's feet."""
        job.done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            for event in ready:
                self._stream.wait_event(event)
            try:
                job.kept = self._compress(job.batch, rest)
            finally:
                job.done.record(self._stream)
                self._latest.append(job.done)

    @torch.inference_mode()
    def _compress(self, batch: CompressionBatch | TileBatch, rest: Rest | None) -> list[_Kept]:
        if isinstance(batch, TileBatch):
            return self._compress_tiles(batch, rest)
        cache, max_keep = self._cache, max(batch.keep)
        known = self._inv_freq, self._calibration, self._outputs, self._sinks
        event = batch.event(cache, self._spec, self._shard, self._model_heads, *known)
        if batch.policy.drops_blocks:
            # The same slots stay in all layers and heads, whole blocks of them.
            kept, failed = choose(batch.policy, event, max_keep)
            first_slots = kept[0, :, 0, :: cache.block_size].tolist()
            pages = [[slot // cache.block_size for slot in row if slot >= 0] for row in first_slots]
            for kept, keep in zip(pages, batch.keep, strict=True):
                if len(set(kept)) * cache.block_size != keep:
                    raise ValueError(f"{batch.policy.name} ranks the slots of a block apart, but it drops whole blocks")
            tables = [[blocks[page] for page in kept] for blocks, kept in zip(batch.sources, pages, strict=True)]
        else:
            pages, tables = [None] * len(batch.orders), batch.tables
            failed = self._move(batch, event, rest)
        try:
            sizes = zip(tables, batch.keep, strict=True)
            positions = [self.positions(table, keep) if self._trace else None for table, keep in sizes]
            errors = self.ranks.look(batch.policy.name, [order.number for order in batch.orders], failed)
        except Exception as error:
            raise PartlyCompressed(0 if batch.policy.drops_blocks else event.num_layers, [failed]) from error
        return [_Kept(*kept) for kept in zip(pages, positions, errors, strict=True)]

    def _compress_tiles(self, batch: TileBatch, rest: Rest | None) -> list[_Kept]:
        """Compress what is not compressed yet, and wait for what each head keeps."""
        rest = rest or Rest(0, False)
        counts = [] if rest.counts is None else [rest.counts]
        failed = torch.full((len(batch.orders),), rest.is_misranked, device=self._cache.k.device)
        if rest.first_layer < self._spec.num_layers:
            choice = self._tiles.compress(batch, rest.first_layer, 1 if rest.first_layer else None)
            counts.append(choice.counts)
            failed = failed | choice.failed
        counts = torch.cat(counts)
        try:
            kept = counts.transpose(0, 1).flatten(1).cpu().numpy()
            positions = [None] * len(batch.orders)
            if self._trace:
                size = self._cache.block_size
                for row, (order, of_lines) in enumerate(zip(batch.orders, kept, strict=True)):
                    table, _ = order.block_ids.cut(of_lines, order.rule.keep, size)
                    positions[row] = self.positions(table, order.rule.keep)
            errors = self.ranks.look(batch.policy.name, [order.number for order in batch.orders], failed)
        except Exception as error:
            raise PartlyCompressed(self._spec.num_layers, [failed], counts) from error
        return [_Kept(None, *found) for found in zip(positions, errors, kept, strict=True)]

    def _move(self, batch: CompressionBatch, event: PagedEvent, rest: Rest | None) -> Tensor:
        """Compress into the destinations what is not compressed yet: bool [R], whether a rank of any layer was NaN."""
        first_layer, was_misranked, stride = (0, False, self._layer_stride) if rest is None else (*rest[:2], 1)
        if first_layer == event.num_layers:
            return torch.full((event.num_requests,), was_misranked, device=event.device)
        failed = compress(
            batch.policy,
            event,
            self._cache.states,
            batch.destinations(event.device),
            max_keep=max(batch.keep),
            stride=stride,
            first_layer=first_layer,
        ).failed
        return failed | was_misranked if was_misranked else failed


def _place(policy: Policy, error: BaseException) -> str | None:
    """The line of the policy's own file that an error comes from; where its scores can't be used, that of `rank`."""
    scoring = Policy.score.__code__
    if not any(frame.f_code is scoring for frame, _ in walk_tb(error.__traceback__)):
        return None
    rank = type(policy).rank.__code__
    return place_in(error, files_of(type(policy))) or relative(rank.co_filename, rank.co_firstlineno)


class _Kept(NamedTuple):
    """As in `CompressionResult`."""

    pages: list[int] | None
    positions: np.ndarray | None
    error: str | None
    counts: np.ndarray | None = None


class _Waiting(NamedTuple):
    """An order that was submitted at `start` (host clock), and the event that its compression must follow."""

    order: CompressionOrder
    start: float
    ready: torch.cuda.Event | None


@dataclass(eq=False)
class _Job:
    """A batch that was launched, and what came of it.

    Attributes:
        starts: when each of its orders was submitted (host clock).
        delayed: skips a poll.
        kept: of each order, once launched; unset where `error` says what was raised instead.
        done: recorded behind it on the worker's stream, if it has one.
    """

    batch: CompressionBatch | TileBatch
    starts: list[float]
    delayed: bool
    kept: list[_Kept] | None = None
    error: BaseException | None = None
    done: torch.cuda.Event | None = None

    @property
    def is_done(self) -> bool:
        return not self.delayed and (self.done is None or self.done.query())


class _Inline(Executor):
    """Runs what it is given at once, in the caller's thread."""

    def submit(self, run: Callable, /, *args: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(run(*args))
        except FAULTS as error:
            future.set_exception(error)
        return future
