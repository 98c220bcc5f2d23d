"""Steps as CUDA graphs, so that a step costs the host one launch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kernels.cache_view import shared
from kernels.spans import NO_ROW, Spans
from kernels.store_positions import store_positions
from zipage.models.decoder import Decoder
from zipage.worker.block_tables import BlockTables
from zipage.worker.entry_scorer import EntryScorer
from zipage.worker.kv_cache import KVCache
from zipage.worker.mixed_attention import LayerGroup, LayerGroups, MixedAttention
from zipage.worker.paged_attention import PagedAttention
from zipage.worker.step_recurrence import StepRecurrence
from zipage.worker.tile_tables import TileTables
from zipage.worker.tiled_attention import TiledAttention
from zipage.worker.token_batch import PromptChunks, TokenBatch

DECODED_TOKENS = 256
"""Tokens of prompts that may attend as decodes beside a full batch of them."""

DECODED_READS = 2**16
"""Entries that these tokens may read. Each reads all before it anew, where prefill attention reads them once a tile."""

PROMPT_TOKENS = 2048
"""Tokens of prompts that a graph takes beside a full batch of decodes. With more of them a device is busy for longer
than it takes to launch their kernels."""

PROMPTS = 8
"""Chunks of prompts that a graph takes. Prefill attention launches programs for as many of the longest length there may
be, and those that have nothing to do take time too."""

NO_CHUNKS = PromptChunks(*(np.zeros(n, dtype=np.int64) for n in (0, 0, 1)))


def batch_sizes(largest: int) -> list[int]:
    """Batch sizes worth a graph: 1, 2, 4, 8, then in steps of 16 to 256, 32 to 512, 64 to 1,024 and 128 beyond; the
    last is `largest`.
    """
    sizes = [1, 2, 4, 8, *range(16, 256, 16), *range(256, 512, 32), *range(512, 1024, 64), *range(1024, largest, 128)]
    return [size for size in sizes if size < largest] + [largest]


def known_tokens(token_ids: Tensor, token_rows: Tensor, sampled: Tensor) -> Tensor:
    """int64 [T]: `token_ids`, and tokens of `sampled` where `token_rows` is not -1."""
    return torch.where(token_rows < 0, token_ids, sampled[token_rows.clamp(min=0)])


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all captures. For each stream it is called on, cuBLAS keeps a workspace (32 MiB on Hopper) as
    long as the process lives.
    """
    return torch.cuda.Stream(device)


class StepGraphs:
    """A forward pass, captured once for each of a few sizes and replayed.

    There are two kinds. In one every token attends as a decode: decodes do, and beside them prompts while they are
    short, each token a row that attends to its request's entries up to its own, which all rows of a layer store before
    any attends. The other has prefill attention too, for up to `PROMPTS` chunks of prompts.

    A batch runs in the smallest graph that holds it. The rows beyond it store nothing and attend to nothing, so they
    change nothing. A graph is captured when a batch of its size first comes. All share one pool of memory, and the
    largest is captured first, since what it frees holds all others; a smaller one would leave it too little, and the
    pool would grow with each. They share what they read and what they write, too.

    Args:
        decoder, cache: of the engine; queries are stored where the cache has query slots.
        tables: of all requests.
        sampled: int64 [max_num_seqs], the tokens of the step before.
        max_num_batched_tokens: most tokens of a step.
        stream: `capture_stream` of the device; None on a CPU, where nothing is captured.
        scorer: of new entries, where the cache keeps predictions.
        sliding_tables: of all requests in sliding layers, where there are any.

    Attributes:
        most: tokens of the largest graph.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        tables: BlockTables | TileTables,
        sampled: Tensor,
        max_num_batched_tokens: int,
        stream: torch.cuda.Stream | None,
        scorer: EntryScorer | None = None,
        sliding_tables: BlockTables | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._tables = tables
        self._sampled = sampled
        self._stream = stream
        self._scorer = scorer
        self._groups = LayerGroups(decoder)
        self._sliding_tables = sliding_tables
        slides = sliding_tables is not None
        self._lines = 7 + slides
        """Fields of `TokenBatch` that a graph reads."""
        self._chunk_numbers = (3 + slides) * PROMPTS + 1
        """What it reads of chunks: their fields, those of `ends` where layers slide."""
        self._take_chunks = not cache.tiled
        # A token of a recurrent layer needs the state that the one before it leaves.
        self._decoded_tokens = DECODED_TOKENS if cache.recurrent is None else 0
        prompt_tokens = PROMPT_TOKENS if self._take_chunks else self._decoded_tokens
        self.most = min(max_num_batched_tokens, len(sampled) + prompt_tokens)
        self._sizes = batch_sizes(self.most)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._inputs: Tensor | None = None
        self._hidden: Tensor | None = None
        """Of the largest graph; all others read and write the first places."""
        self._pool: tuple[int, int] | None = None

    def takes(self, batch: TokenBatch, chunks: PromptChunks) -> bool:
        """Whether a step may run here."""
        few = self._take_chunks and len(chunks) <= PROMPTS and len(batch) <= self.most
        return few or self._all_decode(batch, chunks, self._decoded_tokens)

    @staticmethod
    def _all_decode(batch: TokenBatch, chunks: PromptChunks, most: int = DECODED_TOKENS) -> bool:
        """Whether all tokens of a step may attend as decodes, up to `most` of them of prompts."""
        lens = batch.lens[chunks.bounds[0] :]
        return len(lens) <= most and lens.sum() <= DECODED_READS

    def run(self, batch: TokenBatch, chunks: PromptChunks) -> Tensor:
        """Hidden states [n, width], overwritten by the next run."""
        size = self._size_for(len(batch))
        prompts = not self._all_decode(batch, chunks, self._decoded_tokens)
        if (size, prompts) not in self._graphs:
            self._capture_new(size, prompts)
        inputs = self.inputs(size, batch, chunks if prompts else None)
        self._inputs[: len(inputs)].copy_(inputs.pin_memory(), non_blocking=True)
        self._graphs[size, prompts].replay()
        return self._hidden[: len(batch)]

    def inputs(self, size: int, batch: TokenBatch | None, chunks: PromptChunks | None) -> Tensor:
        """What a graph reads, int64 on the host: the fields of `TokenBatch`, each of `size` and padded with the empty
        row, and where there are `chunks` their fields, padded to `PROMPTS`. No batch: the padding alone.
        """
        lines = self._lines
        flat = np.zeros(lines * size + (0 if chunks is None else self._chunk_numbers), dtype=np.int64)
        packed, last = flat[: lines * size].reshape(lines, size), flat[lines * size :]
        packed[[1, 3, 4]] = packed[7:] = -1
        packed[5] = self._tables.empty_row
        if batch is not None:
            for line, field in zip(packed, fields(TokenBatch)[:lines], strict=True):
                line[: len(batch)] = getattr(batch, field.name)
        if chunks is not None:
            count, decodes = len(chunks), chunks.bounds[0]
            packed[5, decodes:], packed[6, decodes:] = self._tables.empty_row, 0  # they are of no decode
            last[:PROMPTS] = self._tables.empty_row
            last[:count], last[PROMPTS : PROMPTS + count] = chunks.rows, chunks.lens
            last[2 * PROMPTS : 3 * PROMPTS + 1] = chunks.bounds[-1]
            last[2 * PROMPTS : 2 * PROMPTS + count] = chunks.bounds[:-1]
            if count and self._sliding_tables is not None:
                last[3 * PROMPTS + 1 :][:count] = chunks.ends
        return torch.from_numpy(flat)

    def forward(self, inputs: Tensor, size: int) -> Tensor:
        """The captured computation: hidden states [size, width]. Logits are left out, since each graph would keep its
        own, hundreds of megabytes in all.
        """
        lines = inputs[: self._lines * size].view(self._lines, size)
        token_ids, token_rows, positions, slots, queries, rows, lens, *sliding_slots = lines
        chunks = inputs[self._lines * size :]
        queries = None if self._cache.queries is None else queries
        if self._cache.tiled:
            attention = TiledAttention(
                self._cache,
                self._decoder.spec.attention,
                self._tables,
                rows=rows,
                entries=slots,
                positions=positions,
                query_indices=queries,
                num_decodes=size,
            )
            return self._decode(token_ids, token_rows, positions, attention, self._recurrence(rows))
        if self._cache.positions is not None:
            layers, _, heads, _ = self._cache.positions.shape
            store_positions(positions.int(), self._cache.positions, shared(slots, heads, layers))
        decodes = min(size, len(self._sampled)) if len(chunks) else size
        parts = ()
        if len(chunks):
            sizes = [PROMPTS, PROMPTS + 1] + [PROMPTS] * len(sliding_slots)
            parts = chunks[:PROMPTS], *chunks[PROMPTS:].int().split(sizes)
        both = rows[:decodes], parts
        full = self._attention(self._cache, self._groups.full, self._tables, slots, lens, 1, *both)
        full.query_indices, sliding = queries, None
        if sliding_slots:
            # Of no request, a token has no entries here either.
            lens = torch.where(lens > 0, positions + 1, 0)
            kept = self._cache.sliding, self._groups.sliding, self._sliding_tables
            sliding = self._attention(*kept, *sliding_slots, lens, 3, *both)
        recurrence = self._recurrence(rows[:decodes])
        if recurrence is not None and len(chunks):
            fresh = positions[full.cu_seqlens[:-1].clamp(max=size - 1)] == 0
            recurrence.chunks = Spans(self._held(chunks[:PROMPTS]), full.cu_seqlens, fresh)
        return self._decode(token_ids, token_rows, positions, self._groups.join(full, sliding), recurrence)

    def _attention(
        self,
        cache: KVCache,
        group: LayerGroup,
        tables: BlockTables,
        slots: Tensor,
        lens: Tensor,
        chunk_lens: int,
        rows: Tensor,
        chunks: Sequence[Tensor],
    ) -> PagedAttention:
        """Of the layers of one cache. `rows`: of the decodes. `chunks`: rows, lengths, bounds, lengths in sliding
        layers; `chunk_lens` is the place of those that count. None: all tokens are decodes.
        """
        attention = PagedAttention(
            cache,
            group.attention,
            slots=slots,
            num_decodes=len(rows),
            decode_tables=tables.device.index_select(0, rows),
            decode_lens=lens[: len(rows)].int(),
            forms=group.forms,
        )
        if chunks:
            attention.prefill_tables = tables.device.index_select(0, chunks[0])
            attention.prefill_lens, attention.cu_seqlens = chunks[chunk_lens], chunks[2]
            attention.max_seqlen = len(slots)
        return attention

    def _decode(
        self,
        token_ids: Tensor,
        token_rows: Tensor,
        positions: Tensor,
        attention: PagedAttention | MixedAttention | TiledAttention,
        recurrence: StepRecurrence | None,
    ) -> Tensor:
        observe = None if self._cache.predictions is None else self._scorer.into(self._cache, attention.slots)
        token_ids = known_tokens(token_ids, token_rows, self._sampled)
        return self._decoder(token_ids, positions, attention, observe, recurrence)

    def _recurrence(self, rows: Tensor) -> StepRecurrence | None:
        """What recurrent layers do with decodes of these rows, where there are any such layers."""
        recurrent = self._cache.recurrent
        return None if recurrent is None else StepRecurrence(recurrent, Spans(self._held(rows)))

    def _held(self, rows: Tensor) -> Tensor:
        """Rows of the recurrent states, of `rows` of the block tables."""
        return rows.masked_fill(rows == self._tables.empty_row, NO_ROW)

    @property
    def kept_bytes(self) -> int:
        """What graphs keep beside their pool: inputs and hidden states."""
        return (
            8 * (self._lines * self.most + self._chunk_numbers)
            + self.most * self._decoder.spec.width * self._decoder.dtype.itemsize
        )

    def warm_up_largest(self) -> None:
        """Run once what the largest graph of each kind holds. The one where all tokens attend as decodes is no larger,
        but it has block tables for all of them.
        """
        decoded = min(self.most, len(self._sampled) + self._decoded_tokens)
        self._warm_up(self._size_for(decoded), False)
        if self._take_chunks:
            self._warm_up(self.most, True)

    def _size_for(self, tokens: int) -> int:
        """Tokens of the smallest graph that holds so many."""
        return self._sizes[bisect_left(self._sizes, tokens)]

    def _warm_up(self, size: int, prompts: bool) -> Tensor:
        """Run once what is to be captured: a capture allows neither compiling kernels nor setting up libraries.

        Returns:
            What the graph reads.
        """
        host = self.inputs(size, None, NO_CHUNKS if prompts else None)
        inputs = host.to(self._cache.k.device) if self._inputs is None else self._inputs[: len(host)].copy_(host)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self.forward(inputs, size)
        torch.cuda.current_stream().wait_stream(self._stream)
        return inputs

    def _capture_new(self, size: int, prompts: bool) -> None:
        """Capture a graph, and the largest before it, if there is none yet."""
        if self._inputs is None:
            device, spec = self._cache.k.device, self._decoder.spec
            self._inputs = torch.empty(self._lines * self.most + self._chunk_numbers, dtype=torch.int64, device=device)
            self._hidden = torch.empty(self.most, spec.width, dtype=self._decoder.dtype, device=device)
            self._capture(self.most, self._take_chunks)
        if (size, prompts) not in self._graphs:
            self._capture(size, prompts)

    def _capture(self, size: int, prompts: bool) -> None:
        inputs = self._warm_up(size, prompts)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be launching a compression meanwhile, which is not part of this.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._hidden[:size].copy_(self.forward(inputs, size))
        self._pool = graph.pool()
        self._graphs[size, prompts] = graph
