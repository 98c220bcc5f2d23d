"""Steps as CUDA graphs, so that a step costs the host one launch."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kernels.cache_view import shared
from kernels.store_positions import store_positions
from zipage.models.decoder import Decoder
from zipage.worker.block_tables import BlockTables
from zipage.worker.entry_scorer import EntryScorer
from zipage.worker.kv_cache import KVCache
from zipage.worker.paged_attention import PagedAttention
from zipage.worker.tile_tables import TileTables
from zipage.worker.tiled_attention import TiledAttention
from zipage.worker.token_batch import TokenBatch

PROMPT_TOKENS = 256
"""Tokens of prompts that a graph takes beside a full batch of decodes. Not tuned: with more of them, launches are less
of a step, and there are more sizes to capture."""

PROMPT_READS = 2**16
"""Entries that these tokens may read. Each reads all before it anew, where prefill attention reads them once a tile."""


def batch_sizes(largest: int) -> list[int]:
    """Batch sizes worth a graph: 1, 2, 4, 8, then steps of 16 to 256 and of 32 beyond; the last is `largest`."""
    sizes = [1, 2, 4, 8, *range(16, 257, 16), *range(288, largest + 32, 32)]
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
    """A forward pass in which every token attends as a decode, captured once for each of a few sizes and replayed.

    Decodes run here, and prompts beside them while they are short: each of their tokens is a row that attends to its
    request's entries up to its own, which all rows of a layer store before any attends.

    A batch runs in the smallest graph that holds it. The rows beyond it store nothing and attend to nothing, so they
    change nothing. A graph is captured when a batch of its size first comes. All share one pool of memory, and the
    largest is captured first, since what it frees holds all others; a smaller one would leave it too little, and the
    pool would grow with each.

    Args:
        decoder, cache: of the engine; queries are stored where the cache has query slots.
        tables: of all requests.
        sampled: int64 [max_num_seqs], the tokens of the step before.
        stream: `capture_stream` of the device; None on a CPU, where nothing is captured.
        scorer: of new entries, where the cache keeps predictions.

    Attributes:
        most: tokens of the largest graph.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        tables: BlockTables | TileTables,
        sampled: Tensor,
        stream: torch.cuda.Stream | None,
        scorer: EntryScorer | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._tables = tables
        self._sampled = sampled
        self._stream = stream
        self._scorer = scorer
        self.most = len(sampled) + PROMPT_TOKENS
        self._sizes = batch_sizes(self.most)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool: tuple[int, int] | None = None

    @staticmethod
    def take(prompt_lens: np.ndarray) -> bool:
        """Whether tokens of prompts may run here, beside decodes or alone; `prompt_lens` as in `TokenBatch.lens`."""
        return len(prompt_lens) <= PROMPT_TOKENS and prompt_lens.sum() <= PROMPT_READS

    def run(self, batch: TokenBatch) -> Tensor:
        """Hidden states [n, width], overwritten by the next run."""
        size = self._sizes[bisect_left(self._sizes, len(batch))]
        if size not in self._graphs:
            for new in sorted({self.most, size} - self._graphs.keys(), reverse=True):
                self._graphs[new] = self._capture(new)
        graph, inputs, hidden = self._graphs[size]
        inputs.copy_(self.inputs(batch, size).pin_memory(), non_blocking=True)
        graph.replay()
        return hidden[: len(batch)]

    def inputs(self, batch: TokenBatch | None, size: int) -> Tensor:
        """What a graph reads, int64 [7, size] on the host: the fields of `TokenBatch`, padded with the empty row."""
        packed = np.zeros((7, size), dtype=np.int64)
        packed[[1, 3, 4]] = -1
        packed[5] = self._tables.empty_row
        if batch is not None:
            for line, field in zip(packed, fields(TokenBatch), strict=True):
                line[: len(batch)] = getattr(batch, field.name)
        return torch.from_numpy(packed)

    def forward(self, inputs: Tensor) -> Tensor:
        """The captured computation: hidden states [size, width]. Logits are left out, since each graph would keep its
        own, hundreds of megabytes in all.
        """
        token_ids, token_rows, positions, slots, queries, rows, lens = inputs
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
                num_decodes=inputs.shape[1],
            )
            return self._decode(token_ids, token_rows, positions, attention)
        if self._cache.positions is not None:
            layers, _, heads, _ = self._cache.positions.shape
            store_positions(positions.int(), self._cache.positions, shared(slots, heads, layers))
        attention = PagedAttention(
            self._cache,
            self._decoder.spec.attention,
            slots=slots,
            query_indices=queries,
            num_decodes=inputs.shape[1],
            decode_tables=self._tables.device.index_select(0, rows),
            decode_lens=lens.int(),
        )
        return self._decode(token_ids, token_rows, positions, attention)

    def _decode(
        self, token_ids: Tensor, token_rows: Tensor, positions: Tensor, attention: PagedAttention | TiledAttention
    ) -> Tensor:
        observe = None if self._cache.predictions is None else self._scorer.into(self._cache, attention.slots)
        return self._decoder(known_tokens(token_ids, token_rows, self._sampled), positions, attention, observe)

    @property
    def kept_bytes(self) -> int:
        """What all graphs keep, inputs and hidden states, once each is captured."""
        return sum(self._sizes) * (7 * 8 + self._decoder.spec.width * self._decoder.dtype.itemsize)

    def warm_up(self, inputs: Tensor) -> None:
        """Run once what is to be captured: a capture allows neither compiling kernels nor setting up libraries."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self.forward(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        inputs = self.inputs(None, size).to(self._cache.k.device)
        self.warm_up(inputs)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be launching a compression meanwhile, which is not part of this.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            hidden = self.forward(inputs)
        self._pool = graph.pool()
        return graph, inputs, hidden
