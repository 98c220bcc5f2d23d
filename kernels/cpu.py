"""The kernels as vectorised PyTorch, for tensors on a CPU.

Attention copies the entries it needs out of their blocks, a piece at a time that stays in the processor's cache, and
multiplies matrices over the copy. Slots past a request's cache length may hold NaN (0 * NaN is NaN), so their scores
are masked and their V is zeroed in the copy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SPAN = 16
"""Slots copied together: the smallest block, so a short request copies little of a large block."""

PIECE_BYTES = 2 << 20
"""K copied at a time: still in the caches when it is multiplied, and worth the calls."""

MASKED_QUERIES = 512
"""Queries whose causal mask is built at a time."""


def store_kv_torch(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`reference.store_kv`, all tokens at once."""
    stored = slots >= 0
    if not stored.all():
        k, v, slots = k[stored], v[stored], slots[stored]
    blocks = slots.div(k_cache.shape[2], rounding_mode="floor")
    offsets = slots - blocks * k_cache.shape[2]
    heads = torch.arange(k_cache.shape[1])
    index = (blocks[:, None], heads, offsets[:, None])
    k_cache.index_put_(index, k)
    v_cache.index_put_(index, v)


def copy_blocks_torch(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """`reference.copy_blocks`, all layers at once."""
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        k_cache[:, target].copy_(k_cache[:, source])
        v_cache[:, target].copy_(v_cache[:, source])


def paged_decode_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cache_lens: Tensor, scale: float
) -> Tensor:
    """`reference.paged_decode`, in pieces of requests of about the same length, longest first.

    A request's spans are taken with the last, partly filled one first, so that it sits in one place for all; the
    order of entries means nothing to attention.
    """
    batch, query_heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    out = torch.zeros((batch, query_heads, head_dim), dtype=q.dtype)
    lens, order = cache_lens.long().sort(descending=True, stable=True)
    spans = (lens + SPAN - 1).div(SPAN, rounding_mode="floor")
    counts = spans.tolist()
    live = batch - counts.count(0)
    if live == 0:
        return out
    lens, order, spans = lens[:live], order[:live], spans[:live]

    index = _span_index(block_tables[order], spans, counts[0], kv_heads, block_size)
    rows = _pad_rows((q[order].float() * scale).view(live, kv_heads, -1, head_dim))
    k_spans, v_spans = k_cache.view(-1, SPAN * head_dim), v_cache.view(-1, SPAN * head_dim)
    tail_unused = torch.arange(SPAN) >= (lens - (spans - 1) * SPAN)[:, None]
    unused = torch.cat((tail_unused, torch.arange(SPAN, counts[0] * SPAN) >= (spans * SPAN)[:, None]), dim=1)

    span_bytes = kv_heads * SPAN * head_dim * k_cache.element_size()
    piece_spans = max(counts[0], PIECE_BYTES // span_bytes)
    copied = torch.empty((min(piece_spans, live * counts[0]) * kv_heads, SPAN * head_dim), dtype=k_cache.dtype)
    pieces = []
    first = 0
    while first < live:
        width = counts[first]
        last = min(live, first + piece_spans // width)
        masked = SPAN if counts[last - 1] == width else width * SPAN  # of equal lengths, only the last spans have gaps
        piece_index, piece_unused = index[first:last, :, :width], unused[first:last, :masked]
        pieces.append(_attend_piece(rows[first:last], k_spans, v_spans, piece_index, piece_unused, copied))
        first = last
    heads = torch.cat(pieces).view(live, kv_heads, -1, head_dim)[:, :, : query_heads // kv_heads]
    out[order] = heads.reshape(live, query_heads, head_dim).to(q.dtype)
    return out


def _attend_piece(q: Tensor, k_spans: Tensor, v_spans: Tensor, index: Tensor, unused: Tensor, copied: Tensor) -> Tensor:
    """Attention of q [B, H, G, d], scaled, over the spans `index` [B, H, width]. Returns [B * H, G, d].

    `unused` bool [B, n] marks the places of the first n that hold nothing; `copied` is memory for the copy.
    """
    requests, kv_heads, group, head_dim = q.shape
    copied = copied[: index.numel()]
    entries = copied.view(requests * kv_heads, -1, head_dim)
    index = index.reshape(-1)
    torch.index_select(k_spans, 0, index, out=copied)
    scores = torch.bmm(q.reshape(-1, group, head_dim), entries.float().transpose(1, 2))
    by_request = scores.view(requests, kv_heads * group, -1)
    by_request[:, :, : unused.shape[1]].masked_fill_(unused[:, None], float("-inf"))
    weights = scores.softmax(dim=-1)
    torch.index_select(v_spans, 0, index, out=copied)
    last_spans = entries.view(requests, kv_heads, -1, head_dim)[:, :, :SPAN]
    last_spans.masked_fill_(unused[:, None, :SPAN, None], 0)
    return torch.bmm(weights, entries.float())


def _span_index(block_tables: Tensor, spans: Tensor, width: int, kv_heads: int, block_size: int) -> Tensor:
    """Numbers of the spans of each request and head in a cache seen as [spans, SPAN * d]: int64 [B, H, width].

    The last span comes first, then 0, 1, ...; the longest request is row 0. Places past a request's spans name some
    full span of row 0's first block: any finite V will do there, as its weight is 0.
    """
    per_block = block_size // SPAN
    place = torch.arange(-1, width - 1).repeat(len(spans), 1)
    place[:, 0] = spans - 1
    block = block_tables[:, : (width + per_block - 1) // per_block].long()
    block = block.gather(1, place.div(per_block, rounding_mode="floor"))
    missing = torch.arange(width) >= spans[:, None]
    block = torch.where(missing, block_tables[0, 0].long(), block)
    tile = (block * kv_heads)[:, None] + torch.arange(kv_heads)[:, None]
    return tile * per_block + place.remainder(per_block)[:, None]


def _pad_rows(q: Tensor) -> Tensor:
    """Pad q [B, H, G, d] to a multiple of 4 rows: matrix products of 3 rows take longer than of 4."""
    group = q.shape[2]
    return q if group <= 2 else torch.nn.functional.pad(q, (0, 0, 0, -group % 4))


def paged_prefill_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """`reference.paged_prefill`, request by request through PyTorch's fused attention."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    out = torch.zeros(q.shape, dtype=q.dtype)
    bounds = cu_seqlens.tolist()
    for row, length in enumerate(cache_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        # The KV heads are the batch and the query heads of each are the heads: K and V need no repeating.
        queries = q[begin:end].view(end - begin, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        keys = _entries(k_cache, block_tables[row], length)
        values = _entries(v_cache, block_tables[row], length)
        heads = _causal(queries, keys, values, scale)
        out[begin:end] = heads.permute(2, 0, 1, 3).reshape(end - begin, -1, head_dim)
    return out


def _entries(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` entries of a request: [H, 1, length, d], a view where one block holds them."""
    _, kv_heads, block_size, head_dim = cache.shape
    if length <= block_size:
        return cache[int(table[0]), :, None, :length]
    blocks = table[: (length + block_size - 1) // block_size].long()
    tiles = cache.view(-1, block_size * head_dim)
    index = blocks * kv_heads + torch.arange(kv_heads)[:, None]
    return tiles.index_select(0, index.view(-1)).view(kv_heads, 1, -1, head_dim)[:, :, :length]


def _causal(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q [H, G, n, d], the last n of the c entries; keys, values [H, 1, c, d]. Returns [H, G, n, d]."""
    group, queries = q.shape[1:3]
    length = keys.shape[2]
    keys, values = keys.expand(-1, group, -1, -1), values.expand(-1, group, -1, -1)
    if queries == length:
        return scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)
    if queries == 1:
        return scaled_dot_product_attention(q, keys, values, scale=scale)
    parts = []
    for first in range(0, queries, MASKED_QUERIES):
        last = min(queries, first + MASKED_QUERIES)
        limit = length - queries + last
        seen = torch.arange(limit) <= torch.arange(limit - (last - first), limit)[:, None]
        part = q[:, :, first:last], keys[:, :, :limit], values[:, :, :limit]
        parts.append(scaled_dot_product_attention(*part, attn_mask=seen, scale=scale))
    return torch.cat(parts, dim=2)
