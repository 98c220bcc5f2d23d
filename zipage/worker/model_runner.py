"""A step's plan to tensors, through the model, to tokens."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.cache_view import shared
from kernels.copy_blocks import copy_blocks
from kernels.store_positions import store_positions
from zipage.models.decoder import Decoder
from zipage.models.spec import ModelSpec
from zipage.scheduling.plan import StepPlan
from zipage.scheduling.request import Request
from zipage.transfer import to_device
from zipage.worker.block_tables import BlockTables
from zipage.worker.cuda_graph import StepGraphs, capture_stream, known_tokens
from zipage.worker.kv_cache import KVCache
from zipage.worker.paged_attention import PagedAttention
from zipage.worker.sampler import Logprobs, Sampler
from zipage.worker.swap import restore, save
from zipage.worker.token_batch import TokenBatch

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepResult:
    """Tokens (and log-probabilities where asked for) of `plan.sampled`; seconds on the device.

    A token is -1 where the logits were not finite.
    """

    token_ids: list[int]
    logprobs: Logprobs | None
    device_time: float


@dataclass(slots=True)
class Launch:
    """A step under way: what it samples, on the host once the last of `events` has passed."""

    tokens: Tensor | None
    logprobs: Logprobs | None
    device_time: float
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def wait(self) -> StepResult:
        """Wait for the step's tokens."""
        if self.events:
            begin, end = self.events
            end.synchronize()
            self.device_time = begin.elapsed_time(end) / 1000
        tokens = [] if self.tokens is None else self.tokens.tolist()
        return StepResult(tokens, self.logprobs, self.device_time)


@contextmanager
def _noted(lost: dict[Request, str], request: Request, direction: str) -> Iterator[None]:
    """Around the copy of one request's entries: if it fails, say so in `lost`."""
    try:
        yield
    except Exception as error:
        logger.exception("the entries of %r could not be copied %s host memory", request, direction)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        lost[request] = f"its entries could not be copied {direction} host memory: {reason}"


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
        self._tables = self.block_tables(cache)
        if self.device.type == "cuda" and not self.enforce_eager:
            self._graphs = self.step_graphs(cache, self._tables)

    def step_graphs(self, cache: KVCache, tables: BlockTables) -> StepGraphs:
        """Graphs over `cache`, none captured yet."""
        return StepGraphs(self.decoder, cache, tables, self._sampled, self._capture_stream)

    def block_tables(self, cache: KVCache) -> BlockTables:
        """Tables of all rows, none written yet."""
        return BlockTables(self.max_num_seqs, -(-self.max_model_len // cache.block_size), cache.block_size, self.device)

    @torch.inference_mode()
    def move(self, plan: StepPlan) -> dict[Request, str]:
        """Copy blocks as a step demands: pauses first, since resumed requests, and any other, may get their blocks.

        Returns:
            Requests whose entries were lost on the way to host memory or back, and one line each that says why.
        """
        lost: dict[Request, str] = {}
        for request, block_ids, _, query_slot in plan.paused:
            with _noted(lost, request, "to"):
                request.host_copy = save(self.cache, block_ids, query_slot)
        for request, block_ids, num_shared, query_slot in plan.resumed:
            if request not in lost:
                with _noted(lost, request, "from"):
                    restore(self.cache, request.host_copy, block_ids, num_shared, query_slot)
            request.host_copy = None
        if plan.copies:
            self._copy_blocks(plan.copies)
        return lost

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
        if tokens is not None:
            tokens = tokens.to("cpu", non_blocking=True)
        if logprobs is not None:
            logprobs = Logprobs(*(x.to("cpu", non_blocking=True) for x in logprobs))
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
        attention = PagedAttention(self.cache, self.spec.attention, slots=None, num_decodes=num_decodes)
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
