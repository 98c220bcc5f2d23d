"""Causal attention of new queries over paged entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.cache_view import CacheView, check_view, entries_reference, gather_entries
from kernels.layout import check_index, check_queries, fail, given_or_new

MASKED_QUERIES = 512
"""Queries whose causal mask is built at a time."""


def paged_prefill(
    q: Tensor, view: CacheView, cu_seqlens: Tensor, max_seqlen: int, scale: float, out: Tensor | None = None
) -> Tensor:
    """Causal attention of each request's new queries, which are its last entries, over all its entries.

    Args:
        q: [T, Hq, d], requests one after the other, last dimension contiguous, of the caches' dtype.
        view: one layer. Lengths count the chunk: query i of n sees entries 0 .. length - n + i of its head.
        cu_seqlens: int32 [B + 1]; request r's queries are q[cu_seqlens[r] : cu_seqlens[r + 1]].
        max_seqlen: at least the queries of the longest request.
        scale: of the scores, before the softmax.
        out: [T, Hq, d], contiguous, of q's dtype, to write into; None: a new one.

    Returns:
        [T, Hq, d], q's dtype. The softmax is in float32. Rows of tokens that belong to no request are left alone in a
        given `out`, and undefined in a new one.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(q, view, cu_seqlens, max_seqlen)
    if q.is_cuda:
        with torch.cuda.device(q.device):
            return _triton()(q, view, cu_seqlens, max_seqlen, scale, out)
    return paged_prefill_torch(q, view, cu_seqlens, max_seqlen, scale, out)


def _check(q: Tensor, view: CacheView, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Check the arguments of `paged_prefill`. Raises ValueError naming the argument, its value and the remedy."""
    check_view(view, all_layers=False)
    check_queries(q, view.k_cache)
    check_index("cu_seqlens", cu_seqlens, torch.int32, (view.lens.shape[0] + 1,), q.device)
    if not isinstance(max_seqlen, int) or not 0 <= max_seqlen <= q.shape[0]:
        fail("max_seqlen", "value", max_seqlen, f"give the longest request's queries, an int up to {q.shape[0]}")


def paged_prefill_reference(q: Tensor, view: CacheView, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """`paged_prefill`, request by request and head by head."""
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    group = q.shape[1] // view.k_cache.shape[1]
    for row, head in product(*map(range, view.lens.shape)):
        length, table = int(view.lens[row, head]), view.block_tables[row, head]
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        keys, values = (entries_reference(x, table, length, head) for x in (view.k_cache, view.v_cache))
        heads, first_limit = slice(head * group, (head + 1) * group), length - (end - begin) + 1
        out[begin:end, heads] = attend_reference(q[begin:end, heads], keys, values, scale, first_limit)
    return out


def attend_reference(q: Tensor, keys: Tensor, values: Tensor, scale: float, first_limit: int) -> Tensor:
    """q [n, G, d]; keys, values [c, d]. Query i sees the first `first_limit + i` entries. Returns [n, G, d]."""
    scores = q.float().transpose(0, 1) @ keys.T * scale
    limits = first_limit + torch.arange(len(q), device=q.device)
    hidden = torch.arange(len(keys), device=q.device) >= limits[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ values).transpose(0, 1).to(q.dtype)


def paged_prefill_torch(
    q: Tensor, view: CacheView, cu_seqlens: Tensor, max_seqlen: int, scale: float, out: Tensor | None = None
) -> Tensor:
    """`paged_prefill`, request by request through PyTorch's fused attention."""
    k_cache, v_cache, block_tables, lens = view
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    out = given_or_new(out, q)
    group = q.shape[1] // kv_heads
    bounds = cu_seqlens.tolist()
    for heads in view.head_groups():
        some = slice(heads.start * group, heads.stop * group)
        tables = block_tables.select(1, heads.start).unbind()
        for row, length in enumerate(lens.select(1, heads.start).tolist()):
            begin, end = bounds[row], bounds[row + 1]
            if begin == end:
                continue
            # The KV heads are the batch and the query heads of each are the heads: K and V need no repeating.
            queries = q[begin:end, some].view(end - begin, -1, group, head_dim).permute(1, 2, 0, 3)
            keys, values = (gather_entries(x, tables[row], length, heads) for x in (k_cache, v_cache))
            attended = _causal(queries, keys, values, scale)
            out[begin:end, some] = attended.permute(2, 0, 1, 3).reshape(end - begin, -1, head_dim)
    return out


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


@cache
def _triton() -> Callable:
    from kernels.paged_prefill_triton import paged_prefill_triton

    return paged_prefill_triton
