"""Causal attention of new queries over paged entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.entries import entries_reference, gather_entries
from kernels.layout import check_caches, check_index, check_queries, check_tables, fail

MASKED_QUERIES = 512
"""Queries whose causal mask is built at a time."""


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """Causal attention of each request's new queries, which are its last entries, over all its entries.

    Args:
        q: [T, Hq, d], requests one after the other, last dimension contiguous, of the caches' dtype.
        k_cache, v_cache: [num_blocks, H, b, d], one layer; float32, float16 or bfloat16.
        block_tables: int32 [B, max_blocks]; never read past ceil(cache_len / b).
        cu_seqlens: int32 [B + 1]; request r's queries are q[cu_seqlens[r] : cu_seqlens[r + 1]].
        cache_lens: int32 [B], the chunk included. Query i of n sees entries 0 .. cache_len - n + i.
        max_seqlen: queries of the longest request.
        scale: of the scores, before the softmax.

    Returns:
        [T, Hq, d], q's dtype. The softmax is in float32. Rows of tokens that belong to no request are undefined.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(q, k_cache, v_cache, block_tables, cu_seqlens, cache_lens, max_seqlen)
    if q.is_cuda:
        with torch.cuda.device(q.device):
            return _triton()(q, k_cache, v_cache, block_tables, cu_seqlens, cache_lens, max_seqlen, scale)
    return paged_prefill_torch(q, k_cache, v_cache, block_tables, cu_seqlens, cache_lens, max_seqlen, scale)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
) -> None:
    """Check the arguments of `paged_prefill`. Raises ValueError naming the argument, its value and the remedy."""
    check_caches(k_cache, v_cache)
    check_queries(q, k_cache)
    check_index("cache_lens", cache_lens, torch.int32, (-1,), k_cache.device)
    batch = cache_lens.shape[0]
    check_index("cu_seqlens", cu_seqlens, torch.int32, (batch + 1,), k_cache.device)
    check_tables(block_tables, batch, k_cache.device)
    if not isinstance(max_seqlen, int) or not 0 <= max_seqlen <= q.shape[0]:
        fail("max_seqlen", "value", max_seqlen, f"give the longest request's queries, an int up to {q.shape[0]}")


def paged_prefill_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """`paged_prefill`, request by request."""
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for row, length in enumerate(cache_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        keys = entries_reference(k_cache, block_tables[row], length)
        values = entries_reference(v_cache, block_tables[row], length)
        out[begin:end] = attend_reference(q[begin:end], keys, values, scale, first_limit=length - (end - begin) + 1)
    return out


def attend_reference(q: Tensor, keys: Tensor, values: Tensor, scale: float, first_limit: int) -> Tensor:
    """q [n, Hq, d]; keys, values [H, c, d]. Query i sees the first `first_limit + i` entries. Returns [n, Hq, d]."""
    queries, query_heads, _ = q.shape
    group = query_heads // keys.shape[0]
    keys = keys.repeat_interleave(group, dim=0)
    values = values.repeat_interleave(group, dim=0)
    scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * scale
    limits = first_limit + torch.arange(queries, device=q.device)
    hidden = torch.arange(keys.shape[1], device=q.device) >= limits[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ values).transpose(0, 1).to(q.dtype)


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
    """`paged_prefill`, request by request through PyTorch's fused attention."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    out = torch.zeros(q.shape, dtype=q.dtype)
    bounds = cu_seqlens.tolist()
    for row, length in enumerate(cache_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        # The KV heads are the batch and the query heads of each are the heads: K and V need no repeating.
        queries = q[begin:end].view(end - begin, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        keys = gather_entries(k_cache, block_tables[row], length)
        values = gather_entries(v_cache, block_tables[row], length)
        heads = _causal(queries, keys, values, scale)
        out[begin:end] = heads.permute(2, 0, 1, 3).reshape(end - begin, -1, head_dim)
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
