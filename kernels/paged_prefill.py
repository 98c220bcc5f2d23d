"""Causal attention of new queries over paged entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention_form import PLAIN, AttentionForm, check_form
from kernels.cache_view import CacheView, check_view, entries_reference, gather_entries
from kernels.hopper import hopper_kernels
from kernels.layout import check_index, check_queries, fail, given_or_new

MASKED_QUERIES = 512
"""Queries whose causal mask is built at a time."""


def paged_prefill(
    q: Tensor,
    view: CacheView,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    out: Tensor | None = None,
    form: AttentionForm = PLAIN,
) -> Tensor:
    """Causal attention of each request's new queries, which are its last entries, over all its entries.

    Args:
        q: [T, Hq, d], requests one after the other, last dimension contiguous, of the caches' dtype.
        view: one layer. Lengths count the chunk: query i of n sees entries 0 .. length - n + i of its head.
        cu_seqlens: int32 [B + 1]; request r's queries are q[cu_seqlens[r] : cu_seqlens[r + 1]].
        max_seqlen: at least the queries of the longest request.
        scale: of the scores, before the softmax.
        out: [T, Hq, d], contiguous, of q's dtype, to write into; None: a new one.
        form: of the attention. A query's own entry is the last in its window.

    Returns:
        [T, Hq, d], q's dtype. The softmax is in float32. Rows of tokens that belong to no request are left alone in a
        given `out`, and undefined in a new one.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(q, view, cu_seqlens, max_seqlen, form)
    if q.is_cuda:
        with torch.cuda.device(q.device):
            return gpu_kernel(q, form)(q, view, cu_seqlens, max_seqlen, scale, out, form)
    return paged_prefill_torch(q, view, cu_seqlens, max_seqlen, scale, out, form)


def _check(q: Tensor, view: CacheView, cu_seqlens: Tensor, max_seqlen: int, form: AttentionForm) -> None:
    """Check the arguments of `paged_prefill`. Raises ValueError naming the argument, its value and the remedy."""
    check_view(view, all_layers=False)
    check_queries(q, view.k_cache)
    check_index("cu_seqlens", cu_seqlens, torch.int32, (view.lens.shape[0] + 1,), q.device)
    if not isinstance(max_seqlen, int) or not 0 <= max_seqlen <= q.shape[0]:
        fail("max_seqlen", "value", max_seqlen, f"give the longest request's queries, an int up to {q.shape[0]}")
    check_form(form, q)


def paged_prefill_reference(
    q: Tensor, view: CacheView, cu_seqlens: Tensor, max_seqlen: int, scale: float, form: AttentionForm = PLAIN
) -> Tensor:
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
        queries, of_heads = q[begin:end, heads], form.of_heads(heads)
        out[begin:end, heads] = attend_reference(queries, keys, values, scale, first_limit, of_heads)
    return out


def attend_reference(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, first_limit: int, form: AttentionForm = PLAIN
) -> Tensor:
    """q [n, G, d]; keys, values [c, d]. Query i sees the first `first_limit + i` entries, the last of them in a window.

    Returns:
        [n, G, d], of q's dtype.
    """
    scores = q.float().transpose(0, 1) @ keys.T * scale
    if form.soft_cap is not None:
        scores = form.soft_cap * torch.tanh(scores / form.soft_cap)
    entries = torch.arange(len(keys), device=q.device)
    limits = first_limit + torch.arange(len(q), device=q.device)[:, None]
    hidden = entries >= limits
    if form.window is not None:
        hidden |= entries < limits - form.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if form.sinks is not None:
        sinks = form.sinks.float()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(keys)]
    return (weights @ values).transpose(0, 1).to(q.dtype)


def paged_prefill_torch(
    q: Tensor,
    view: CacheView,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    out: Tensor | None = None,
    form: AttentionForm = PLAIN,
) -> Tensor:
    """`paged_prefill`, request by request, through PyTorch's fused attention unless it has a form."""
    k_cache, v_cache, block_tables, lens = view
    kv_heads, block_size, head_dim = k_cache.shape[1:]
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
            if length == 0:  # a decode of nobody
                out[begin:end, some] = 0
                continue
            if form.is_plain:
                keys, values = (gather_entries(x, tables[row], length, heads) for x in (k_cache, v_cache))
                attended = _causal(queries, keys, values, scale)
            else:
                # Blocks before the first query's window are left out.
                unseen = 0 if form.window is None else max(0, length - (end - begin) + 1 - form.window) // block_size
                table, held = tables[row][unseen:], length - unseen * block_size
                keys, values = (gather_entries(x, table, held, heads) for x in (k_cache, v_cache))
                attended = _formed(queries, keys, values, scale, form.of_heads(some))
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


def _formed(q: Tensor, keys: Tensor, values: Tensor, scale: float, form: AttentionForm) -> Tensor:
    """As `_causal`, of any form, in float32."""
    kv_heads, group, queries = q.shape[:3]
    keys, values = keys.float(), values.float()
    length = keys.shape[2]
    entries = torch.arange(length)
    parts = []
    for first in range(0, queries, MASKED_QUERIES):
        part = q[:, :, first : first + MASKED_QUERIES].float()
        own = torch.arange(first, first + part.shape[2])[:, None] + length - queries
        seen = entries <= own
        if form.window is not None:
            seen &= entries > own - form.window
        scores = part @ keys.mT * scale
        if form.soft_cap is not None:
            scores = scores.div_(form.soft_cap).tanh_().mul_(form.soft_cap)
        scores.masked_fill_(~seen, float("-inf"))
        if form.sinks is not None:
            sinks = form.sinks.float().view(kv_heads, group, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sinks), dim=-1)
        parts.append(scores.softmax(dim=-1)[..., :length] @ values)
    return torch.cat(parts, dim=2).to(q.dtype)


def gpu_kernel(q: Tensor, form: AttentionForm) -> Callable:
    """The fastest one that takes these queries on their GPU."""
    hopper = hopper_kernels("paged_prefill")
    return hopper.paged_prefill_gluon if hopper is not None and hopper.takes(q, form) else _triton()


@cache
def _triton() -> Callable:
    from kernels.paged_prefill_triton import paged_prefill_triton

    return paged_prefill_triton
