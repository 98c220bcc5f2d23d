"""Where decode attention on a CPU finds entries: requests cut into spans, which are copied together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cache_view import CacheView

SPAN = 16
"""Slots copied together: the smallest block, so a short request copies little of a large block."""


class DecodeSpans(NamedTuple):
    """The spans of requests that have entries, the longest first.

    Attributes:
        order: int64 [R], the row of each request.
        counts: R spans.
        index: int64 [R, H, counts[0]], numbers of spans in a cache seen as [spans, SPAN * d]. The last span comes
            first, then 0, 1, ...; places past a request's spans name some span of the longest request's first block,
            which has no weight there.
        unused: bool [R, counts[0] * SPAN], the places that hold nothing of the request: in its first span, which is the
            last, partly filled one, and past its spans.
    """

    order: Tensor
    counts: list[int]
    index: Tensor
    unused: Tensor


def decode_spans(view: CacheView) -> DecodeSpans:
    """The spans of a layer's requests, whose heads share tables and lengths."""
    block_tables, cache_lens = view.block_tables.select(1, 0), view.lens.select(1, 0)
    kv_heads, block_size = view.k_cache.shape[1:3]
    lens, order = cache_lens.long().sort(descending=True, stable=True)
    spans = (lens + SPAN - 1).div(SPAN, rounding_mode="floor")
    counts = spans.tolist()
    live = len(counts) - counts.count(0)
    if live == 0:
        return DecodeSpans(order[:0], [], order.new_empty(0, kv_heads, 0), torch.empty(0, 0, dtype=torch.bool))
    width = counts[0]
    lens, order, spans = lens[:live], order[:live], spans[:live]
    index = _span_index(block_tables[order], spans, width, kv_heads, block_size)
    tail_unused = torch.arange(SPAN) >= (lens - (spans - 1) * SPAN)[:, None]
    unused = torch.cat((tail_unused, torch.arange(SPAN, width * SPAN) >= (spans * SPAN)[:, None]), dim=1)
    return DecodeSpans(order, counts[:live], index, unused)


def _span_index(block_tables: Tensor, spans: Tensor, width: int, kv_heads: int, block_size: int) -> Tensor:
    """`DecodeSpans.index`."""
    per_block = block_size // SPAN
    place = torch.arange(-1, width - 1).repeat(len(spans), 1)
    place[:, 0] = spans - 1
    block = block_tables[:, : (width + per_block - 1) // per_block].long()
    block = block.gather(1, place.div(per_block, rounding_mode="floor"))
    missing = torch.arange(width) >= spans[:, None]
    block = torch.where(missing, block_tables[0, 0].long(), block)
    tile = (block * kv_heads)[:, None] + torch.arange(kv_heads)[:, None]
    return tile * per_block + place.remainder(per_block)[:, None]
