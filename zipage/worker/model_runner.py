"""A step's plan to tensors, through the model, to tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.cache_view import shared
from kernels.copy_blocks import copy_blocks
from kernels.store_positions import store_positions
from zipage.eviction.rule import EvictionRule
from zipage.models.decoder import Decoder
from zipage.models.spec import ModelSpec
from zipage.sampling_params import SamplingParams
from zipage.scheduling.plan import CompressionOrder, StepPlan
from zipage.scheduling.request import Request
from zipage.worker.block_tables import BlockTables
from zipage.worker.compression_runner import CompressionRunner
from zipage.worker.compressor import LAUNCH_ENTRIES
from zipage.worker.cuda_graph import StepGraphs, capture_stream, known_tokens
from zipage.worker.kv_cache import KVCache
from zipage.worker.paged_attention import PagedAttention
from zipage.worker.sampler import Sampler
from zipage.worker.swap import restore, save
from zipage.worker.token_batch import TokenBatch
from zipage.worker.transfer import to_device


@dataclass(slots=True)
class StepResult:
    """Tokens (and log-probabilities where asked for) of `plan.sampled`; seconds on the device.

    A token is -1 where the logits were not finite.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    device_time: float


@dataclass(slots=True)
class Launch:
    """A step under way: what it samples, on the host once the last of `events` has passed."""

    tokens: Tensor | None
    logprobs: Tensor | None
    device_time: float
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def wait(self) -> StepResult:
        """Wait for the step's tokens."""
        if self.events:
            begin, end = self.events
            end.synchronize()
            self.device_time = begin.elapsed_time(end) / 1000
        tokens = [] if self.tokens is None else self.tokens.tolist()
        return StepResult(tokens, None if self.logprobs is None else self.logprobs.tolist(), self.device_time)


class ModelRunner:
    """Runs plans over one model and one cache.

    Args:
        decoder: the model, on `device`.
        spec: its shapes.
        max_num_seqs: rows of the batch.
        max_model_len: longest request, in tokens; sizes the block-table rows.
        enforce_eager: on CUDA too, launch every kernel of a step instead of replaying a graph.
    """

    def __init__(
        self,
        decoder: Decoder,
        spec: ModelSpec,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_model_len: int,
        enforce_eager: bool = False,
    ) -> None:
        self.decoder = decoder
        self.spec = spec
        self.device = device
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.enforce_eager = enforce_eager
        self._graphs: StepGraphs | None = None
        self._capture_stream = capture_stream(device) if device.type == "cuda" else None
        self.sampler = Sampler(max_num_seqs, spec.vocab_size, device)
        self.scale = spec.head_dim**-0.5
        self.cache: KVCache | None = None
        self._tables: BlockTables | None = None
        self._sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        """Tokens of the latest step, for the next one to go on from before the host knows them."""
        self._timers: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        if device.type == "cuda":
            # One pair for each step that may be under way, and one in hand.
            for _ in range(3):
                self._timers.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))

    def attach(self, cache: KVCache) -> None:
        """Use `cache` from now on."""
        self.cache = cache
        self._tables = self._block_tables(cache)
        if self.device.type == "cuda" and not self.enforce_eager:
            self._graphs = self._step_graphs(cache, self._tables)

    def _step_graphs(self, cache: KVCache, tables: BlockTables) -> StepGraphs:
        return StepGraphs(self.decoder, cache, self.scale, tables, self._sampled, self._capture_stream)

    def _block_tables(self, cache: KVCache) -> BlockTables:
        return BlockTables(self.max_num_seqs, -(-self.max_model_len // cache.block_size), cache.block_size, self.device)

    @torch.inference_mode()
    def move(self, plan: StepPlan) -> None:
        """Copy blocks as a step demands: pauses first, since resumed requests, and any other, may get their blocks."""
        for request, block_ids, _, query_slot in plan.paused:
            request.host_copy = save(self.cache, block_ids, query_slot)
        for request, block_ids, num_shared, query_slot in plan.resumed:
            restore(self.cache, request.host_copy, block_ids, num_shared, query_slot)
            request.host_copy = None
        if plan.copies:
            self._copy_blocks(plan.copies)

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        src, dst = (self._tensor(ids) for ids in np.array(copies, dtype=np.int64).T)
        copy_blocks(self.cache.k, self.cache.v, src, dst)
        if self.cache.positions is not None:
            self.cache.positions[:, dst] = self.cache.positions[:, src]
        # Scores have no meaning there: only a compression writes them, and the blocks of a compressed request are no
        # longer a prefix of its text that another could take over.

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launch:
        """Begin to compute a step, after its moves: the forward pass and the sampling, where there are tokens.

        On CUDA this returns when both are queued. The step before may still be under way: a request's pending token is
        then taken from where that step leaves it.
        """
        start = time.perf_counter()
        events = None
        if self._timers:
            self._timers.rotate()
            events = self._timers[0]
            events[0].record()
        tokens = logprobs = None
        if plan.num_tokens:
            logits = self.forward(plan)
            if plan.sampled:
                tokens, logprobs = self.sampler.sample(logits, plan.sampled)
                # -1 stands for logits that were not finite; the next step may not look that up.
                torch.clamp(tokens, min=0, out=self._sampled[: len(tokens)])
        if events is None:
            return Launch(tokens, logprobs, time.perf_counter() - start)
        # Copied from here, so that nothing queued behind the step is waited for.
        tokens, logprobs = (None if x is None else x.to("cpu", non_blocking=True) for x in (tokens, logprobs))
        events[1].record()
        return Launch(tokens, logprobs, 0.0, events)

    def forward(self, plan: StepPlan) -> Tensor:
        """Logits [len(plan.sampled), vocab] of a plan's requests."""
        batch, num_decodes = self._token_batch(plan), len(plan.decodes)
        if self._graphs is not None and self._graphs.take(batch.lens[num_decodes:]):
            hidden = self._graphs.run(batch)
        else:
            hidden = self._run_eagerly(plan, batch)
        if plan.prefills:
            last = num_decodes - 1 + np.cumsum([count for _, count in plan.prefills])
            ended = [request.num_computed + count == request.num_tokens for request, count in plan.prefills]
            hidden = hidden[self._tensor(np.concatenate((np.arange(num_decodes), last[ended])), np.int64)]
        return self.decoder.logits(hidden)

    def _token_batch(self, plan: StepPlan) -> TokenBatch:
        """Decodes, then the tokens of the prompts; the block tables are up to date."""
        parts = [self._decodes(plan.decodes), *(self._chunk(*chunk) for chunk in plan.prefills)]
        self._tables.upload()
        return TokenBatch.concatenate(parts)

    def _decodes(self, requests: list[Request]) -> TokenBatch:
        for request in requests:
            if request.num_table_written != len(request.block_ids):
                self._tables.write(request)
        values = [
            (r.token_ids[-1], r.place if r.num_pending else -1, r.num_computed, r.row, r.cache_len) for r in requests
        ]
        token_ids, places, positions, rows, lens = np.array(values, dtype=np.int64).reshape(-1, 5).T
        queries = self._query_indices(requests, positions)
        return TokenBatch(token_ids, places, positions, self._tables.slots(rows, lens), queries, rows, lens + 1)

    def _chunk(self, request: Request, num_tokens: int) -> TokenBatch:
        self._tables.write(request)
        begin = request.num_computed
        positions = np.arange(begin, begin + num_tokens)
        entries = np.arange(request.cache_len, request.cache_len + num_tokens)
        return TokenBatch(
            token_ids=np.array(request.token_ids[begin : begin + num_tokens], dtype=np.int64),
            places=np.full(num_tokens, -1),
            positions=positions,
            slots=self._tables.slots(request.row, entries),
            queries=self._chunk_queries(request, positions),
            rows=np.full(num_tokens, request.row),
            lens=entries + 1,
        )

    def _run_eagerly(self, plan: StepPlan, batch: TokenBatch) -> Tensor:
        """Hidden states [n, width], every kernel launched from here; prompts take prefill attention."""
        num_decodes = len(plan.decodes)
        attention = PagedAttention(self.cache, self.scale, slots=None, num_decodes=num_decodes)
        if num_decodes:
            lens = batch.lens[:num_decodes]
            attention.decode_lens = self._tensor(lens, np.int32)
            attention.decode_tables = self._tables.of(batch.rows[:num_decodes], int(lens.max()))
        if plan.prefills:
            counts = [chunk.num_tokens for chunk in plan.prefills]
            ends = np.cumsum([0, *counts])
            lens = batch.lens[num_decodes + ends[1:] - 1]
            rows = batch.rows[num_decodes + ends[:-1]]
            attention.prefill_tables = self._tables.of(rows, int(lens.max()))
            attention.prefill_lens = self._tensor(lens, np.int32)
            attention.cu_seqlens = self._tensor(ends, np.int32)
            attention.max_seqlen = max(counts)
        fields = batch.token_ids, batch.places, batch.positions, batch.slots, batch.queries
        token_ids, places, positions, attention.slots, queries = self._tensor(np.stack(fields), np.int64)
        if self.cache.queries is not None:
            attention.query_indices = queries
        if batch.places.max() >= 0:
            token_ids = known_tokens(token_ids, places, self._sampled)
        if self.cache.positions is not None:
            layers, _, heads, _ = self.cache.positions.shape
            store_positions(positions.int(), self.cache.positions, shared(attention.slots, heads, layers))
        return self.decoder(token_ids, positions, attention)

    def _query_indices(self, requests: list[Request], positions: np.ndarray) -> np.ndarray:
        """int64 [n], where the queries of each request's token at `positions` go, or -1."""
        window = self.cache.window
        if self.cache.queries is None:
            return np.full(len(requests), -1)
        slots = np.array(
            [r.query_slot if r.rule is not None and r.rule.window else -1 for r in requests], dtype=np.int64
        )
        return np.where(slots >= 0, slots * window + positions % max(window, 1), -1)

    def _chunk_queries(self, request: Request, positions: np.ndarray) -> np.ndarray:
        """The same for a chunk: of a longer one only the last w tokens, so that no two share a place of the ring."""
        queries = self._query_indices([request] * len(positions), positions)
        queries[: max(0, len(positions) - self.cache.window)] = -1
        return queries

    def _tensor(self, values: list | np.ndarray, dtype: type | None = None) -> Tensor:
        return to_device(values, self.device, dtype)

    @torch.inference_mode()
    def measure_peak(
        self,
        num_tokens: int,
        block_size: int,
        dtype: torch.dtype,
        *,
        rule: EvictionRule | None = None,
        asynchronous: bool = False,
        layer_stride: int | None = None,
    ) -> int:
        """Bytes that a step takes at most above what is allocated now (CUDA), caches not counted.

        Runs the largest step and, where requests are compressed, the largest compression, each on a small cache of its
        own.

        Args:
            num_tokens: of the step.
            rule: of compressions; None for full KV.
            asynchronous: a compression runs beside a step, so that both peaks may fall together.
            layer_stride: layers of one launch of a compression, as in `compress`.

        Raises:
            RuntimeError: the largest compression failed.
        """
        num_blocks = -(-min(num_tokens, self.max_model_len) // block_size)
        cache = KVCache(self.spec, num_blocks, block_size, dtype, self.device)
        peak = self._peak_of(lambda: self._run_largest_step(cache, num_tokens))
        if not self.enforce_eager:
            # Graphs keep what they allocate, beside what other steps do; the largest needs most, and all share it.
            graphs = self._step_graphs(cache, self._block_tables(cache))
            inputs = graphs.inputs(None, graphs.most).to(self.device)
            peak += self._peak_of(lambda: graphs.warm_up(inputs)) + graphs.kept_bytes
            del graphs, inputs
        del cache
        if rule is not None:
            options = {"positions": True, "scores": rule.policy.state, "num_query_slots": 1, "window": rule.window}
            cache = KVCache(self.spec, rule.max_blocks, block_size, dtype, self.device, **options)
            longest = -(-self.max_model_len // block_size)
            most = max(1, LAUNCH_ENTRIES // (self.spec.num_kv_heads * longest * block_size))
            compression = self._peak_of(lambda: self._run_compression(cache, rule, layer_stride, longest, most))
            # The shape of most compressions to come, so that its kernels are compiled before requests wait for them.
            self._run_compression(cache, rule, layer_stride, rule.max_blocks, 1)
            del cache
            peak = peak + compression if asynchronous else max(peak, compression)
        torch.cuda.empty_cache()
        return peak

    def _peak_of(self, run: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _run_largest_step(self, cache: KVCache, num_tokens: int) -> None:
        """Prompts of `num_tokens` tokens in all, as many rows sampled as the batch may have, with every option on."""
        length = min(num_tokens, self.max_model_len)
        chunks = [length] * (num_tokens // length) + [num_tokens % length] * bool(num_tokens % length)
        entries = np.concatenate([np.arange(n) for n in chunks])
        attention = PagedAttention(
            cache,
            self.scale,
            slots=self._tensor(entries, np.int64),
            prefill_tables=self._tensor(np.tile(np.arange(cache.k.shape[1]), (len(chunks), 1)), np.int32),
            prefill_lens=self._tensor(chunks, np.int32),
            cu_seqlens=self._tensor(np.cumsum([0, *chunks]), np.int32),
            max_seqlen=length,
        )
        tokens = self._tensor(np.zeros(num_tokens), np.int64)
        hidden = self.decoder(tokens, self._tensor(entries, np.int64), attention)
        rows = min(self.max_num_seqs, num_tokens)
        params = SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=True)
        requests = [Request("peak", [0], params, max_total_tokens=2) for _ in range(rows)]
        # Rows of two kinds are drawn apart, which takes a copy of their logits.
        requests[0].params = SamplingParams(temperature=0.7)
        for row, request in enumerate(requests):
            request.row = row
        sampler = Sampler(self.max_num_seqs, self.spec.vocab_size, self.device)
        sampler.sample(self.decoder.logits(hidden[:rows]), requests)

    def _run_compression(
        self, cache: KVCache, rule: EvictionRule, layer_stride: int | None, num_blocks: int, num_requests: int
    ) -> None:
        """Compress requests of `num_blocks` blocks in one batch.

        All read the cache's last block wherever they read and write the same zeros into the others: what a compression
        allocates depends on its shapes alone.
        """
        for x in (*cache.entry_tensors, *([] if cache.queries is None else [cache.queries])):
            x.zero_()
        num_entries = num_blocks * cache.block_size
        new_ids = list(range(rule.max_blocks - 1))
        orders = []
        for _ in range(num_requests):
            request = Request("peak", [0], SamplingParams(), max_total_tokens=2, rule=rule)
            request.num_computed = request.cache_len = num_entries
            request.query_slot = 0
            orders.append(CompressionOrder(request, [len(new_ids)] * num_blocks, new_ids, new_ids))
        runner = CompressionRunner(cache, self.spec, asynchronous=False, layer_stride=layer_stride, trace=False)
        runner.submit(orders)
        for result in runner.poll(wait=True):
            if result.error is not None:
                raise RuntimeError(f"the largest compression could not be measured: {result.error}")
