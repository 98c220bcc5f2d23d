"""Which queries of a window attend to which paged entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.attention_score import capped, check_window, shares
from kernels.cache_view import CacheView, entries_reference, gather_entries
from kernels.layout import WORD, fail


def attended(
    q_cache: Tensor,
    view: CacheView,
    query_slots: Tensor,
    window_ends: Tensor,
    scale: float,
    threshold: float,
    *,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """A bit for each of a request's last w queries and each of its n entries: whether the one attends to the other.

    It does where the maximum over the query heads of a KV head of its softmax, over the entries that it sees, is
    `threshold` or more in float32.

    Args:
        q_cache, view, query_slots, window_ends, scale, soft_cap, sinks: as in `attention_score`.
        threshold: in (0, 1].

    Returns:
        int32 [ceil(w / 32), L, R, H, max_blocks * b]: bit q % 32 of word q // 32 is query q's; 0 past n.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    check_window(q_cache, view, query_slots, window_ends, soft_cap, sinks)
    if not 0 < threshold <= 1:
        fail("threshold", "value", threshold, "give a number in (0, 1]")
    args = q_cache, view, query_slots, window_ends, scale, threshold
    if q_cache.is_cuda:
        with torch.cuda.device(q_cache.device):
            return _triton()(*args, soft_cap=soft_cap, sinks=sinks)
    return attended_torch(*args, soft_cap=soft_cap, sinks=sinks)


def attended_reference(
    q_cache: Tensor,
    view: CacheView,
    query_slots: Tensor,
    window_ends: Tensor,
    scale: float,
    threshold: float,
    *,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attended`, layer by layer, request by request and query by query."""
    window, query_heads = q_cache.shape[2:4]
    group_size = query_heads // view.k_cache.shape[2]
    out = _no_bits(view, window).cpu()
    for layer, row, head in product(*map(range, view.lens.shape)):
        length = int(view.lens[layer, row, head])
        if length == 0:
            continue
        heads = slice(head * group_size, (head + 1) * group_size)
        queries = q_cache[layer, int(query_slots[row]), :, heads].cpu().float()
        keys = entries_reference(view.k_cache[layer], view.block_tables[layer, row, head], length, head).cpu().float()
        for q in range(window):
            seen = length - window + q + 1
            place = (int(window_ends[row]) - window + q) % window
            logits = capped(queries[place] @ keys[:seen].T * scale, soft_cap)
            weights = shares(logits, None if sinks is None else sinks[layer, heads].cpu().float())
            out[q // WORD, layer, row, head, :seen] += (weights.amax(0) >= threshold).int() << q % WORD
    return out.to(view.k_cache.device)


def attended_torch(
    q_cache: Tensor,
    view: CacheView,
    query_slots: Tensor,
    window_ends: Tensor,
    scale: float,
    threshold: float,
    *,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attended`, a matrix product for each layer and request."""
    window, query_heads = q_cache.shape[2:4]
    group_size = query_heads // view.k_cache.shape[2]
    out = _no_bits(view, window)
    order = torch.arange(window)
    rings = ((window_ends[:, None] - window + order) % window).unbind()
    hidden = order > order[:, None]
    bits = torch.ones(window, dtype=torch.int32) << (order % WORD).int()
    for layer, row, heads, length, table in view.lines():
        queries = q_cache[layer, query_slots[row]].index_select(0, rings[row]).float() * scale
        queries = queries.unflatten(1, (-1, group_size))[:, heads].permute(1, 2, 0, 3)
        keys = gather_entries(view.k_cache[layer], table, length, heads).float()
        logits = capped(queries @ keys.mT, soft_cap)
        logits[..., length - window :].masked_fill_(hidden, float("-inf"))
        of_heads = None if sinks is None else sinks[layer].float().view(-1, group_size, 1)[heads]
        marked = (shares(logits, of_heads).amax(dim=1) >= threshold) * bits[:, None]
        for word, of_word in zip(out, marked.split(WORD, dim=1), strict=True):
            word[layer, row, heads, :length] = of_word.sum(dim=1, dtype=torch.int32)
    return out


def _no_bits(view: CacheView, window: int) -> Tensor:
    shape = -(-window // WORD), *view.lens.shape, view.width
    return torch.zeros(shape, dtype=torch.int32, device=view.k_cache.device)


@cache
def _triton() -> Callable:
    from kernels.attention_score_triton import attended_triton

    return attended_triton
