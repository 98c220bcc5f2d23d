"""Attention of one query per request over its paged entries.

On a CPU, entries are copied out of their blocks, a piece at a time that stays in the processor's cache, and matrices
multiplied over the copy. Slots past a request's cache length may hold NaN (0 * NaN is NaN), so their scores are masked
and their V is zeroed in the copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.attention_form import PLAIN, AttentionForm, check_form
from kernels.cache_view import CacheView, check_view, entries_reference
from kernels.decode_spans import SPAN, DecodeSpans, decode_spans
from kernels.hopper import hopper_kernels
from kernels.layout import check_queries, fail, given_or_new
from kernels.paged_prefill import attend_reference, paged_prefill_torch
from kernels.pieces import Pieces
from kernels.shares import Shares

PIECE_BYTES = 2 << 20
"""K copied at a time: still in the caches when it is multiplied, and worth the calls."""


def paged_decode(
    q: Tensor,
    view: CacheView,
    scale: float,
    pieces: Pieces | Shares | DecodeSpans | None = None,
    out: Tensor | None = None,
    form: AttentionForm = PLAIN,
    early: bool = False,
) -> Tensor:
    """Attention of one query per request over its entries.

    Args:
        q: [B, Hq, d], last dimension contiguous, of the caches' dtype; Hq a multiple of H.
        view: one layer. Lengths count the current token's entry; 0 gives zeros.
        scale: of the scores, before the softmax.
        pieces: `decode_pieces` of these lengths, caches and tables; None: they are made here.
        out: [B, Hq, d], contiguous, of q's dtype, to write into; None: a new one.
        form: of the attention. The current token's entry is the last in a window.
        early: entries from before this step, and all of `view` and `pieces` but the caches, may be read while kernels
            launched before still run: another layer had these pieces before this one.

    Returns:
        [B, Hq, d], q's dtype. The softmax is in float32.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above, or the kernel that has such `pieces`
            has no such attention.
    """
    _check(q, view, form)
    if pieces is not None:
        _check_pieces(pieces, q, view)
    if q.is_cuda:
        with torch.cuda.device(q.device):
            if isinstance(pieces, Shares):
                return hopper_kernels("paged_decode").paged_decode_gluon(q, view, scale, pieces, out, form, early)
            return _triton()(q, view, scale, pieces, out, form)
    return paged_decode_torch(q, view, scale, out, form, pieces)


def _check(q: Tensor, view: CacheView, form: AttentionForm) -> None:
    """Check the arguments of `paged_decode`. Raises ValueError naming the argument, its value and the remedy."""
    check_view(view, all_layers=False)
    check_queries(q, view.k_cache)
    if view.lens.shape[0] != q.shape[0]:
        fail("lens", "shape", tuple(view.lens.shape), f"give {q.shape[0]} requests, one for each query")
    check_form(form, q)


def _check_pieces(pieces: Pieces | Shares | DecodeSpans, q: Tensor, view: CacheView) -> None:
    """Check that pieces are of such a device and of as many lines. Raises ValueError as `_check`."""
    if isinstance(pieces, DecodeSpans) == q.is_cuda:
        fail("pieces", "type", type(pieces).__name__, f"give decode_pieces of this view, on {q.device}, or None")
    if not isinstance(pieces, DecodeSpans) and pieces.arrived.numel() != view.lens.numel():
        shape = tuple(pieces.arrived.shape)
        fail("pieces.arrived", "shape", shape, f"give decode_pieces of this view, {tuple(view.lens.shape)}, or None")


def paged_decode_reference(q: Tensor, view: CacheView, scale: float, form: AttentionForm = PLAIN) -> Tensor:
    """`paged_decode`, request by request and head by head."""
    out = torch.zeros_like(q)
    group = q.shape[1] // view.k_cache.shape[1]
    for row, head in product(*map(range, view.lens.shape)):
        length, table = int(view.lens[row, head]), view.block_tables[row, head]
        if length == 0:
            continue
        keys, values = (entries_reference(x, table, length, head) for x in (view.k_cache, view.v_cache))
        heads = slice(head * group, (head + 1) * group)
        query, of_heads = q[row : row + 1, heads], form.of_heads(heads)
        out[row, heads] = attend_reference(query, keys, values, scale, length, of_heads)[0]
    return out


def paged_decode_torch(
    q: Tensor,
    view: CacheView,
    scale: float,
    out: Tensor | None = None,
    form: AttentionForm = PLAIN,
    spans: DecodeSpans | None = None,
) -> Tensor:
    """`paged_decode`, in pieces of requests of about the same length, longest first.

    A request's spans are taken with the last, partly filled one first, so that it sits in one place for all; the
    order of entries means nothing to attention. Forms, to which it does, take prefill attention of one query each.
    """
    out = given_or_new(out, q)
    if not form.is_plain:
        bounds = torch.arange(len(q) + 1, dtype=torch.int32)
        return paged_prefill_torch(q, view, bounds, min(1, len(q)), scale, out, form)
    if view.heads_differ:
        by_head = q.reshape(view.lens.numel(), -1, q.shape[2])
        paged_decode_torch(by_head, view.by_head(), scale, out.view(by_head.shape))
        return out
    order, counts, index, unused = decode_spans(view) if spans is None else spans
    k_cache, v_cache = view.k_cache, view.v_cache
    live, (query_heads, head_dim), kv_heads = len(counts), q.shape[1:], k_cache.shape[1]
    out.zero_()
    if live == 0:
        return out
    rows = _pad_rows((q[order].float() * scale).view(live, kv_heads, -1, head_dim))
    k_spans, v_spans = k_cache.view(-1, SPAN * head_dim), v_cache.view(-1, SPAN * head_dim)
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
        first_gap = counts[last - 1] * SPAN
        of_spans = k_spans, v_spans, piece_index, piece_unused, first_gap, copied
        pieces.append(_attend_piece(rows[first:last], *of_spans))
        first = last
    heads = torch.cat(pieces).view(live, kv_heads, -1, head_dim)[:, :, : query_heads // kv_heads]
    out[order] = heads.reshape(live, query_heads, head_dim).to(q.dtype)
    return out


def _attend_piece(
    q: Tensor, k_spans: Tensor, v_spans: Tensor, index: Tensor, unused: Tensor, first_gap: int, copied: Tensor
) -> Tensor:
    """Attention of q [B, H, G, d], scaled, over the spans `index` [B, H, width]. Returns [B * H, G, d].

    `unused` bool [B, n] marks the places of the first n that hold nothing: some in the first span, others from
    `first_gap` on. `copied` is memory for the copy.
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
    by_head = entries.view(requests, kv_heads, -1, head_dim)
    # Last spans, and places past a request's spans, which name another's: its values may not be finite.
    for places in (slice(SPAN), slice(max(SPAN, first_gap), unused.shape[1])):
        by_head[:, :, places].masked_fill_(unused[:, None, places, None], 0)
    return torch.bmm(weights, entries.float())


def _pad_rows(q: Tensor) -> Tensor:
    """Pad q [B, H, G, d] to a multiple of 4 rows: matrix products of 3 rows take longer than of 4."""
    group = q.shape[2]
    return q if group <= 2 else torch.nn.functional.pad(q, (0, 0, 0, -group % 4))


@cache
def _triton() -> Callable:
    from kernels.paged_decode_triton import paged_decode_triton

    return paged_decode_triton
