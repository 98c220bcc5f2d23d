"""A step's plan to tensors, through the model, to tokens."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.cache_view import shared
from kernels.copy_blocks import copy_blocks
from kernels.spans import Spans
from kernels.store_positions import store_positions
from zipage.eviction.fault import first_line
from zipage.models.decoder import Decoder
from zipage.models.spec import ModelSpec
from zipage.scheduling.plan import StepPlan
from zipage.transfer import to_device
from zipage.worker.block_tables import BlockTables
from zipage.worker.cuda_graph import StepGraphs, capture_stream, known_tokens
from zipage.worker.entry_scorer import EntryScorer
from zipage.worker.kv_cache import KVCache
from zipage.worker.mixed_attention import LayerGroup, LayerGroups
from zipage.worker.paged_attention import PagedAttention
from zipage.worker.recurrent_states import RecurrentStates
from zipage.worker.sampler import Logprobs, Sampler
from zipage.worker.step_recurrence import StepRecurrence
from zipage.worker.swap import Swapper, slab_blocks
from zipage.worker.tile_tables import TileTables
from zipage.worker.tiled_attention import TiledAttention
from zipage.worker.token_batch import PromptChunks, TokenBatch

logger = logging.getLogger(__name__)

LOGIT_ROWS = 4_096
"""Tokens of the vocabulary whose weights are widened to float32 at once."""


@dataclass(slots=True)
class StepResult:
    """Tokens of the requests that were sampled, log-probabilities and hidden states where asked for; device seconds.

    A token is -1 where the logits were not finite. `hidden` is [N, width], what the tokens were drawn from.
    """

    token_ids: list[int]
    logprobs: Logprobs | None
    hidden: Tensor | None
    device_time: float


@dataclass(slots=True)
class Launch:
    """A step under way: what it samples, on the host once the last of `events` has passed."""

    tokens: Tensor | None
    logprobs: Logprobs | None
    hidden: Tensor | None
    device_time: float
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def wait(self) -> StepResult:
        """Wait for the step's tokens."""
        if self.events:
            begin, end = self.events
            end.synchronize()
            self.device_time = begin.elapsed_time(end) / 1000
        tokens = [] if self.tokens is None else self.tokens.tolist()
        return StepResult(tokens, self.logprobs, self.hidden, self.device_time)


def check_width(hidden: Tensor, width: int) -> None:
    """Raise a ValueError where hidden states are not [T, width]."""
    if hidden.dim() != 2 or hidden.shape[1] != width:
        raise ValueError(f"hidden_states of shape {tuple(hidden.shape)}: must be [T, {width}]")


@contextmanager
def _noted(lost: dict[int, str], number: int, direction: str) -> Iterator[None]:
    """Around the copy of one request's entries: if it fails, say so in `lost`."""
    try:
        yield
    except Exception as error:
        logger.exception("the entries of request %d could not be copied %s host memory", number, direction)
        lost[number] = f"its entries could not be copied {direction} host memory: {first_line(error)}"


class ModelRunner:
    """Runs plans over one model and one cache.

    Of a model that is spread over ranks, each has a runner for its shard, and all run the same plans. Rank 0 samples;
    the others get its tokens.

    Args:
        decoder: the model, or a shard of it, on `device`.
        spec: its shapes.
        max_num_seqs: rows of the batch.
        max_num_batched_tokens: most tokens of a step.
        max_model_len: longest request, in tokens; sizes the block-table rows.
        enforce_eager: on CUDA too, launch every kernel of a step instead of replaying a graph.
        scorer: of new entries, where the cache keeps predictions.

    Attributes:
        recurrent: what recurrent layers keep of each row; None where there are none.
        groups: the layers by what holds their entries.
    """

    def __init__(
        self,
        decoder: Decoder,
        spec: ModelSpec,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enforce_eager: bool = False,
        scorer: EntryScorer | None = None,
    ) -> None:
        self.decoder = decoder
        self.spec = spec
        self.device = device
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enforce_eager = enforce_eager
        self.scorer = scorer
        self._graphs: StepGraphs | None = None
        self._capture_stream = capture_stream(device) if device.type == "cuda" else None
        self.sampler = Sampler(max_num_seqs, spec.vocab_size, device)
        self.recurrent = None
        if spec.recurrent is not None:
            self.recurrent = RecurrentStates(spec.recurrent, max_num_seqs, decoder.dtype, device)
        self.cache: KVCache | None = None
        self.groups = LayerGroups(decoder)
        self._tables: BlockTables | TileTables | None = None
        self._sliding_tables: BlockTables | None = None
        self.swapper: Swapper | None = None
        self._sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        """Tokens of the latest step, for the next one to go on from before the host knows them."""
        self._timers: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        if device.type == "cuda":
            # One pair for each step that may be under way, and one in hand.
            for _ in range(3):
                self._timers.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))

    def attach(self, cache: KVCache, num_host_slabs: int = 0) -> None:
        """Use `cache` from now on, with so much host memory for requests that leave it."""
        self.cache = cache
        columns = self.spec.num_layers * self.spec.num_kv_heads if cache.tiled else 1
        self.swapper = Swapper(cache, slab_blocks(cache.block_size) * columns, num_host_slabs)
        self._tables, self._sliding_tables = self.block_tables(cache), self.sliding_tables(cache)
        if self.device.type == "cuda" and not self.enforce_eager:
            self._graphs = self.step_graphs(cache, self._tables, self._sliding_tables)

    def step_graphs(
        self, cache: KVCache, tables: BlockTables | TileTables, sliding_tables: BlockTables | None = None
    ) -> StepGraphs:
        """Graphs over `cache`, none captured yet."""
        most = self.max_num_batched_tokens
        kept = self._sampled, most, self._capture_stream, self.scorer
        return StepGraphs(self.decoder, cache, tables, *kept, sliding_tables=sliding_tables)

    def block_tables(self, cache: KVCache) -> BlockTables | TileTables:
        """Tables of all rows, none written yet."""
        size = self.max_num_seqs, -(-self.max_model_len // cache.block_size), cache.block_size, self.device
        if cache.tiled:
            return TileTables(*size, num_layers=self.spec.num_layers, num_heads=self.spec.num_kv_heads)
        return BlockTables(*size)

    def sliding_tables(self, cache: KVCache) -> BlockTables | None:
        """The same of sliding layers, where there are any."""
        return None if cache.sliding is None else self.block_tables(cache.sliding)

    @torch.inference_mode()
    def move(self, plan: StepPlan) -> dict[int, str]:
        """Copy blocks as a step demands: saves first, since restored requests, and any other, may get their blocks.

        On CUDA what goes to host memory and back goes beside the plan's step, which waits only where it takes blocks
        that are still copied. Whatever is queued behind that step waits for all.

        Returns:
            Numbers of requests whose entries were lost on the way to host memory or back, and one line each that says
            why.
        """
        swapper, lost = self.swapper, {}
        for number in plan.drops:
            swapper.drop(number)
        if plan.saves or plan.restores:
            swapper.begin()
            for save in plan.saves:
                with _noted(lost, save.number, "to"):
                    swapper.save(*save)
            for restore in plan.restores:
                if restore.number not in lost:
                    with _noted(lost, restore.number, "from"):
                        swapper.restore(*restore)
            if len(plan.rows):
                swapper.wait_for(plan.blocks_taken(), plan.sliding_blocks_taken())
            else:
                swapper.wait()
        if plan.copies:
            self._copy_blocks(self.cache, plan.copies)
        if plan.sliding_copies:
            self._copy_blocks(self.cache.sliding, plan.sliding_copies)
        return lost

    def _copy_blocks(self, cache: KVCache, copies: list[tuple[int, int]]) -> None:
        src, dst = (self._tensor(ids) for ids in np.array(copies, dtype=np.int64).T)
        copy_blocks(cache.k, cache.v, src, dst)
        for x in cache.states:
            x[:, dst] = x[:, src]
        # Scores have no meaning there: only a compression writes them, and the blocks of a compressed request are no
        # longer a prefix of its text that another could take over.

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launch:
        """Begin to compute a step, after its moves: the forward pass and the sampling, where there are tokens.

        On CUDA this returns when both are queued. The step before may still be under way: a request's pending token is
        then taken from where that step leaves it.
        """
        begin = time.perf_counter()
        events = None
        if self._timers:
            self._timers.rotate()
            events = self._timers[0]
            events[0].record()
        shard = self.decoder.shard
        if shard.rank == 0:
            for start in plan.starts:
                self.sampler.begin(start)
        tokens = logprobs = hidden = None
        if len(plan.rows):
            hidden = self.forward(plan)
            if len(hidden):
                logits = self.decoder.logits(hidden)
                sampled = self._sampled[: len(hidden)]
                if shard.rank == 0:
                    tokens, logprobs = self._sample(plan, logits)
                    # -1 stands for logits that were not finite; the next step may not look that up.
                    torch.clamp(tokens, min=0, out=sampled)
                if not shard.is_whole:
                    shard.collectives.broadcast(sampled)
            if not self.sampler.rows.wants_hidden_states(plan.rows):
                hidden = None
        if events is None:
            return Launch(tokens, logprobs, hidden, time.perf_counter() - begin)
        # Copied from here, so that nothing queued behind the step is waited for.
        if tokens is not None:
            tokens = tokens.to("cpu", non_blocking=True)
        if logprobs is not None:
            logprobs = Logprobs(*(x.to("cpu", non_blocking=True) for x in logprobs))
        if hidden is not None:
            hidden = hidden.to("cpu", non_blocking=True)
        events[1].record()
        self.swapper.wait()
        return Launch(tokens, logprobs, hidden, 0.0, events)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, vocab] of hidden states [N, width], in pieces, so that no copy of all weights is made.

        Raises:
            ValueError: they are not of the model's width.
        """
        check_width(hidden, self.spec.width)
        hidden = hidden.to(self.device, torch.float32)
        pieces = self.decoder.lm_head.split(LOGIT_ROWS)
        logits = torch.cat([hidden @ piece.float().T for piece in pieces], dim=1)
        return self.decoder.capped(self.decoder.shard.all_tokens(logits, self.spec.vocab_size))

    def forward(self, plan: StepPlan) -> Tensor:
        """Hidden states [N, width] that the tokens of a plan are drawn from."""
        for growth in plan.tables:
            self._tables.write(growth)
        self._tables.upload()
        if self._sliding_tables is not None:
            for growth in plan.sliding_tables:
                self._sliding_tables.write(growth)
            self._sliding_tables.upload()
        batch = TokenBatch.of(plan, self._tables, self.cache.window, self._sliding_tables)
        chunks = PromptChunks.of(plan)
        if self._graphs is not None and self._graphs.takes(batch, chunks):
            hidden = self._graphs.run(batch, chunks)
        else:
            hidden = self._run_eagerly(plan, batch, chunks)
        if len(plan.rows) > plan.num_decodes:
            hidden = hidden[self._tensor(self._last_places(plan))]
        return hidden

    def _sample(self, plan: StepPlan, logits: Tensor) -> tuple[Tensor, Logprobs | None]:
        rows, lens, token_ids = plan.rows, plan.positions + plan.counts, plan.token_ids
        if len(rows) > plan.num_decodes:
            rows, lens, token_ids = rows[plan.samples], lens[plan.samples], token_ids[self._last_places(plan)]
        return self.sampler.sample(logits, rows, lens, token_ids)

    @staticmethod
    def _last_places(plan: StepPlan) -> np.ndarray:
        """int64 [N], places of the tokens whose successors are sampled."""
        return (np.cumsum(plan.counts) - 1)[plan.samples]

    def _run_eagerly(self, plan: StepPlan, batch: TokenBatch, chunks: PromptChunks) -> Tensor:
        """Hidden states [n, width], every kernel launched from here; prompts take prefill attention."""
        if self.cache.tiled:
            return self._run_tiled(plan, batch)
        groups, cache, num_decodes = self.groups, self.cache, plan.num_decodes
        rows = batch.rows[:num_decodes], chunks
        full, sliding = self._attention(cache, groups.full, self._tables, batch.lens, chunks.lens, *rows), None
        fields = [batch.token_ids, batch.token_rows, batch.positions, batch.slots, batch.queries]
        if cache.sliding is not None:
            lens = batch.positions + 1, chunks.ends
            sliding = self._attention(cache.sliding, groups.sliding, self._sliding_tables, *lens, *rows)
            fields.append(batch.sliding_slots)
        token_ids, token_rows, positions, full.slots, queries, *more = self._tensor(np.stack(fields))
        if cache.queries is not None:
            full.query_indices = queries
        if sliding is not None:
            (sliding.slots,) = more
        if batch.token_rows.max() >= 0:
            token_ids = known_tokens(token_ids, token_rows, self._sampled)
        if self.cache.positions is not None:
            layers, _, heads, _ = self.cache.positions.shape
            store_positions(positions.int(), self.cache.positions, shared(full.slots, heads, layers))
        attention, recurrence = groups.join(full, sliding), self._recurrence(plan)
        return self.decoder(token_ids, positions, attention, self._observe(full.slots), recurrence)

    def _attention(
        self,
        cache: KVCache,
        group: LayerGroup,
        tables: BlockTables,
        lens: np.ndarray,
        chunk_lens: np.ndarray,
        decode_rows: np.ndarray,
        chunks: PromptChunks,
    ) -> PagedAttention:
        """Of the layers of one cache, without slots; `lens` of each token, `chunk_lens` of each chunk."""
        count = len(decode_rows)
        attention = PagedAttention(cache, group.attention, slots=None, num_decodes=count, forms=group.forms)
        if count:
            attention.decode_lens = self._tensor(lens[:count], np.int32)
            attention.decode_tables = tables.of(decode_rows, int(lens[:count].max()))
        if len(chunks):
            attention.prefill_tables = tables.of(chunks.rows, int(chunk_lens.max()))
            attention.prefill_lens = self._tensor(chunk_lens, np.int32)
            attention.cu_seqlens = self._tensor(chunks.bounds, np.int32)
            attention.max_seqlen = int(np.diff(chunks.bounds).max())
        return attention

    def _recurrence(self, plan: StepPlan) -> StepRecurrence | None:
        """What recurrent layers do with a plan, where there are any."""
        if self.recurrent is None:
            return None
        n, chunks = plan.num_decodes, None
        rows = self._tensor(plan.rows)
        if len(plan.rows) > n:
            starts = np.cumsum([n, *plan.counts[n:]])
            fresh = self._tensor(plan.positions[n:]) == 0
            chunks = Spans(rows[n:], self._tensor(starts, np.int32), fresh)
        return StepRecurrence(self.recurrent, Spans(rows[:n]), chunks)

    def _observe(self, slots: Tensor) -> Callable[[int, Tensor], None] | None:
        """What scores new entries, where the cache keeps predictions."""
        return None if self.cache.predictions is None else self.scorer.into(self.cache, slots)

    def _run_tiled(self, plan: StepPlan, batch: TokenBatch) -> Tensor:
        """`_run_eagerly` where heads hold unequal lengths."""
        fields = batch.token_ids, batch.token_rows, batch.positions, batch.slots, batch.queries, batch.rows
        token_ids, token_rows, positions, entries, queries, rows = self._tensor(np.stack(fields))
        if batch.token_rows.max() >= 0:
            token_ids = known_tokens(token_ids, token_rows, self._sampled)
        attention = TiledAttention(
            self.cache,
            self.spec.attention,
            self._tables,
            rows=rows,
            entries=entries,
            positions=positions,
            query_indices=None if self.cache.queries is None else queries,
            num_decodes=plan.num_decodes,
            width=self._tables.width(plan.rows),
            chunks=plan.counts[plan.num_decodes :].tolist(),
        )
        observe, recurrence = self._observe(attention.slots), self._recurrence(plan)
        return self.decoder(token_ids, positions, attention, observe, recurrence)

    def _tensor(self, values: list | np.ndarray, dtype: type | None = None) -> Tensor:
        return to_device(values, self.device, dtype)
