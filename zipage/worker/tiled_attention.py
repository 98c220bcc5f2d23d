"""Attention of one step over tiles, where heads hold unequal lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.decode_pieces import decode_pieces
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import paged_prefill
from kernels.store_kv import store_kv
from kernels.store_positions import store_positions
from kernels.store_step import store_step
from zipage.models.attention import AttentionSpec
from zipage.transfer import to_device
from zipage.worker.kv_cache import KVCache
from zipage.worker.tile_tables import TileTables


class TiledAttention:
    """As `PagedAttention`: to the kernels each request and KV head is a request of its own, of a cache of one head.

    So decode attention cuts every head by its own length. The batch is decodes followed by prefill chunks.

    Args:
        cache: of tiles.
        tables: of all requests.
        rows: int64 [T], of each token's request.
        entries: int64 [T], where its entry goes, by the cache length of its request; -1: nowhere, and it attends to
            nothing.
        positions: int64 [T], logical ones, which are stored here.
        query_indices: as `PagedAttention`'s.
        num_decodes: leading tokens that are decodes.
        width: tiles of the longest line of the batch; None: unknown.
        chunks: tokens of each prefill chunk.
    """

    def __init__(
        self,
        cache: KVCache,
        layers: Sequence[AttentionSpec],
        tables: TileTables,
        *,
        rows: Tensor,
        entries: Tensor,
        positions: Tensor,
        query_indices: Tensor | None,
        num_decodes: int,
        width: int | None = None,
        chunks: Sequence[int] = (),
    ) -> None:
        self.cache = cache
        self.layers = layers
        self._tables, self._width = tables, width
        self._num_decodes = num_decodes
        slots = tables.slots_of(rows, entries)
        num_layers, _, self._heads = slots.shape
        of_lines = positions.int()[:, None].repeat(num_layers, self._heads).view(-1)
        store_positions(of_lines, cache.positions, slots.view(1, -1, 1))
        self._slots = slots.view(num_layers, -1, 1)
        self._queries = None
        if query_indices is not None:
            of_heads = query_indices[:, None] * self._heads + torch.arange(self._heads, device=rows.device)
            self._queries = torch.where(query_indices[:, None] >= 0, of_heads, -1).view(-1)
        if num_decodes:
            self._decodes = rows[:num_decodes]
            lens = tables.lens_of(self._decodes, entries[:num_decodes] + 1)
            self._lens = lens.view(num_layers, -1, 1)
            view = CacheView(cache.k, cache.v, tables.tables[..., :width], self._lens)
            self._pieces = decode_pieces(view, layers[0].num_heads // layers[0].num_kv_heads)
        self._max_seqlen = max(chunks, default=0)
        if chunks:
            bounds = np.cumsum([0, *chunks])
            starts = np.arange(self._heads)[:, None] * bounds[-1] + bounds[:-1]
            self._bounds = to_device([*starts.flat, self._heads * bounds[-1]], rows.device, np.int32)
            last = to_device(num_decodes + bounds[1:] - 1, rows.device)
            self._prefills = rows[last]
            lens = tables.lens_of(self._prefills, entries[last] + 1)
            self._prefill_lens = lens.transpose(1, 2).reshape(num_layers, -1, 1)

    @property
    def slots(self) -> Tensor:
        """int64 [L, T * H, 1], where each token's entry goes in each layer and head."""
        return self._slots

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, d], k and v [T, H, d], after rotary -> [T, Hq, d]."""
        cache, scale = self.cache, self.layers[layer].scale
        k_cache, v_cache = cache.k[0], cache.v[0]
        head_dim = q.shape[2]
        by_head = q.reshape(len(q) * self._heads, -1, head_dim)
        k, v = k.reshape(-1, 1, head_dim), v.reshape(-1, 1, head_dim)
        if self._queries is None:
            store_kv(k, v, k_cache, v_cache, self._slots[layer])
        else:
            # A place of the ring is one of a KV head's group of queries.
            slots, window = cache.queries.shape[1:3]
            q_cache = cache.queries[layer].view(slots, window * self._heads, -1, head_dim)
            store_step(k, v, by_head, k_cache, v_cache, q_cache, self._slots[layer], self._queries)
        parts, n = [], self._num_decodes
        if n:
            tables = self._tables.of(layer, self._decodes, self._width).flatten(0, 1)[:, None]
            view = CacheView(k_cache, v_cache, tables, self._lens[layer])
            pieces = None if self._pieces is None else self._pieces.layer(layer)
            parts.append(paged_decode(by_head[: n * self._heads], view, scale, pieces).view(n, *q.shape[1:]))
        if self._max_seqlen:
            chunks = by_head[n * self._heads :].unflatten(0, (-1, self._heads)).transpose(0, 1)
            tables = self._tables.of(layer, self._prefills, self._width).transpose(0, 1).flatten(0, 1)[:, None]
            view = CacheView(k_cache, v_cache, tables, self._prefill_lens[layer])
            out = paged_prefill(chunks.flatten(0, 1), view, self._bounds, self._max_seqlen, scale)
            parts.append(out.unflatten(0, (self._heads, -1)).transpose(0, 1).reshape(-1, *q.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
