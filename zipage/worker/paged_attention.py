"""Attention of one step over the paged cache: what the model calls in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView, shared
from kernels.decode_pieces import decode_pieces
from kernels.decode_spans import DecodeSpans
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import paged_prefill
from kernels.pieces import Pieces
from kernels.shares import Shares
from kernels.store_kv import store_kv
from kernels.store_step import store_step
from zipage.models.attention import AttentionSpec
from zipage.worker.kv_cache import KVCache


@dataclass(slots=True)
class PagedAttention:
    """Stores a layer's new keys and values, and the queries that an eviction will read, then attends over block tables.
    The layers are those of one cache.

    The batch is decodes (one token each) followed by prefill chunks. Tokens of neither attend to nothing; what comes of
    them has no meaning.

    Attributes:
        cache: the paged keys and values.
        layers: attention of each layer.
        slots: int64 [T], where each token's entry goes; the same in every layer.
        query_indices: int64 [T], where each token's queries go (`store_step`); None where no request keeps any.
        num_decodes: leading tokens that attend as decodes, one request each. Tokens of chunks may be among them, with a
            length of 0.
        decode_tables, prefill_tables: int32 [B, max blocks of the part].
        decode_lens, prefill_lens: int32 [B], entries of each request with this step's included.
        cu_seqlens: int32 [prefills + 1], borders of the chunks in the batch.
        max_seqlen: at least the longest chunk; 0: there is none.
        forms: of each layer's attention; None: all are plain. What lies before a window is not read.
    """

    cache: KVCache
    layers: Sequence[AttentionSpec]
    slots: Tensor
    query_indices: Tensor | None = None
    num_decodes: int = 0
    decode_tables: Tensor | None = None
    decode_lens: Tensor | None = None
    prefill_tables: Tensor | None = None
    prefill_lens: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    forms: Sequence[AttentionForm] | None = None
    _slots: Tensor | None = field(init=False, default=None)
    _decodes: tuple[Tensor, Tensor] | None = field(init=False, default=None)
    _prefills: tuple[Tensor, Tensor] | None = field(init=False, default=None)
    _pieces: Pieces | Shares | DecodeSpans | None = field(init=False, default=None)
    """Slots, (tables, lengths) and the decodes' pieces as kernels take them, made at the first call for all layers."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, d], k and v [T, H, d], after rotary -> [T, Hq, d]."""
        k_cache, v_cache, scale = self.cache.k[layer], self.cache.v[layer], self.layers[layer].scale
        early = self._slots is not None
        if not early:
            self._share(k_cache, v_cache, q.shape[1] // k.shape[1])
        n, form = self.num_decodes, PLAIN if self.forms is None else self.forms[layer]
        if self.query_indices is None:
            store_kv(k, v, k_cache, v_cache, self._slots)
        else:
            store_step(k, v, q, k_cache, v_cache, self.cache.queries[layer], self._slots, self.query_indices)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if n:
            view = CacheView(k_cache, v_cache, *self._decodes)
            paged_decode(q[:n], view, scale, self._pieces, out[:n], form, early)
        if self.max_seqlen:
            view = CacheView(k_cache, v_cache, *self._prefills)
            paged_prefill(q, view, self.cu_seqlens, self.max_seqlen, scale, out, form)
        return out

    def _share(self, k_cache: Tensor, v_cache: Tensor, group: int) -> None:
        """All KV heads have the same slots, tables and lengths, and `group` query heads each."""
        heads = k_cache.shape[1]
        self._slots = shared(self.slots, heads)
        if self.num_decodes:
            self._decodes = shared(self.decode_tables, heads), shared(self.decode_lens, heads)
            view = CacheView(k_cache, v_cache, *self._decodes)
            self._pieces = decode_pieces(view, group, self.forms or (PLAIN,))
        if self.max_seqlen:
            self._prefills = shared(self.prefill_tables, heads), shared(self.prefill_lens, heads)
