"""What a window of stored queries thinks of paged entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.entries import entries_reference, gather_entries, scores_like
from kernels.layout import check_all_layers, check_choice, check_index, check_like, check_requests, fail

REDUCTIONS = {"max": torch.amax, "mean": torch.mean, "sum": torch.sum}


def attention_score(
    q_cache: Tensor,
    k_cache: Tensor,
    query_slots: Tensor,
    window_ends: Tensor,
    block_tables: Tensor,
    lens: Tensor,
    scale: float,
    *,
    softmax: str = "all",
    group: str = "max",
    window: str = "mean",
) -> Tensor:
    """What a request's last w queries, the tokens of its last w entries, think of each of its n entries.

    A softmax of each query over the entries, then `group` over the query heads of a KV head, then `window` over the
    queries. Zipage (arXiv 2603.08743) and G-KV (2512.00504) use (all, max, mean), SnapKV (2404.14469) (all, mean,
    mean), R-KV (2505.24133) (group_cut, max, mean), MorphKV (2503.00979) (cut, max, sum or max).

    Args:
        q_cache: [L, num_query_slots, w, Hq, d], each layer contiguous, of k_cache's dtype; Hq a multiple of H.
        k_cache: [L, num_blocks, H, b, d], any range of layers; float32, float16 or bfloat16.
        query_slots: int32 [R].
        window_ends: int32 [R]; the last query of the window is that of logical position end - 1, and end >= w.
        block_tables: int32 [R, max_blocks]; never read past ceil(n / b).
        lens: int32 [R], n: at least w, or 0 for a row that is left out.
        scale: of the logits, before the softmax.
        softmax: "all": over the entries that a query sees, itself included; "cut": over the entries before the
            window; "group_cut": the same of the logits reduced by `group`, one softmax a KV head.
        group: "max" or "mean".
        window: "mean", "sum" or "max".

    Returns:
        float32 [L, R, H, max_blocks * b]; -inf past n, and in the window's own columns where they are cut.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    _check(
        q_cache, k_cache, query_slots, window_ends, block_tables, lens, softmax, group, window
    )  # fmt: skip
    args = q_cache, k_cache, query_slots, window_ends, block_tables, lens, scale
    kinds = {"softmax": softmax, "group": group, "window": window}
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            return _triton()(*args, **kinds)
    return attention_score_torch(*args, **kinds)


def _check(
    q_cache: Tensor,
    k_cache: Tensor,
    query_slots: Tensor,
    window_ends: Tensor,
    block_tables: Tensor,
    lens: Tensor,
    softmax: str,
    group: str,
    window: str,
) -> None:
    """Check the arguments of `attention_score`. Raises ValueError naming the argument, its value and the remedy."""
    check_all_layers(k_cache, k_cache)
    layers, _, heads, _, head_dim = k_cache.shape
    shape = tuple(q_cache.shape)
    if q_cache.dim() != 5 or shape[0] != layers or shape[4] != head_dim or 0 in shape[2:] or shape[3] % heads:
        fail("q_cache", "shape", shape, f"give [{layers}, slots, window, a multiple of {heads} heads, {head_dim}]")
    check_like("q_cache", q_cache, k_cache)
    if not q_cache[0].is_contiguous():
        fail("q_cache", "stride", q_cache.stride(), "make each layer contiguous")
    check_requests(block_tables, lens, k_cache.device)
    check_index("query_slots", query_slots, torch.int32, tuple(lens.shape), k_cache.device)
    check_index("window_ends", window_ends, torch.int32, tuple(lens.shape), k_cache.device)
    check_choice("softmax", softmax, ("all", "cut", "group_cut"))
    check_choice("group", group, ("max", "mean"))
    check_choice("window", window, ("mean", "sum", "max"))


def attention_score_reference(
    q_cache: Tensor,
    k_cache: Tensor,
    query_slots: Tensor,
    window_ends: Tensor,
    block_tables: Tensor,
    lens: Tensor,
    scale: float,
    *,
    softmax: str = "all",
    group: str = "max",
    window: str = "mean",
) -> Tensor:
    """`attention_score`, layer by layer and request by request."""
    layers, _, kv_heads, block_size, _ = k_cache.shape
    width = q_cache.shape[2]
    reduce_group, reduce_window = REDUCTIONS[group], REDUCTIONS[window]
    out = torch.full((layers, len(lens), kv_heads, block_tables.shape[1] * block_size), float("-inf"))
    for layer, row in product(range(layers), range(len(lens))):
        length = int(lens[row])
        if length == 0:
            continue
        places = (int(window_ends[row]) - width + torch.arange(width)) % width
        queries = q_cache[layer, int(query_slots[row])].cpu()[places].float()
        queries = queries.view(width, kv_heads, -1, queries.shape[-1])
        keys = entries_reference(k_cache[layer], block_tables[row], length).cpu()
        logits = torch.einsum("qhgd,hjd->hgqj", queries, keys) * scale
        past = length - width
        if softmax == "all":
            hidden = torch.arange(length) > past + torch.arange(width)[:, None]
            weights = reduce_group(logits.masked_fill(hidden, float("-inf")).softmax(dim=-1), 1)
        elif softmax == "cut":
            weights = reduce_group(logits[..., :past].softmax(dim=-1), 1)
        else:
            weights = reduce_group(logits[..., :past], 1).softmax(dim=-1)
        out[layer, row, :, : weights.shape[-1]] = reduce_window(weights, 1)
    return out.to(k_cache.device)


def attention_score_torch(
    q_cache: Tensor,
    k_cache: Tensor,
    query_slots: Tensor,
    window_ends: Tensor,
    block_tables: Tensor,
    lens: Tensor,
    scale: float,
    *,
    softmax: str = "all",
    group: str = "max",
    window: str = "mean",
) -> Tensor:
    """`attention_score`, a matrix product for each layer and request."""
    layers, _, kv_heads, _, head_dim = k_cache.shape
    queries, query_heads = q_cache.shape[2:4]
    out = scores_like(k_cache, block_tables)
    ends, slots = window_ends.tolist(), query_slots.tolist()
    reduce_group = torch.amax if group == "max" else torch.mean
    for row, length in enumerate(lens.tolist()):
        if length == 0:
            continue
        past = length - queries
        scored = length if softmax == "all" else past
        ring = torch.arange(ends[row] - queries, ends[row]) % queries
        hidden = torch.arange(past, length) > torch.arange(past, length)[:, None]
        for layer in range(layers):
            q = q_cache[layer, slots[row]].index_select(0, ring).view(queries, kv_heads, -1, head_dim)
            q = (q.float() * scale).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
            keys = gather_entries(k_cache[layer], block_tables[row], length)[:, 0, :scored].float()
            logits = torch.bmm(q, keys.transpose(1, 2)).view(kv_heads, query_heads // kv_heads, queries, scored)
            if softmax == "all":
                logits[..., past:].masked_fill_(hidden, float("-inf"))
            if softmax == "group_cut":
                weights = reduce_group(logits, 1).softmax(dim=-1)
            else:
                weights = reduce_group(logits.softmax(dim=-1), 1)
            if window == "max":
                out[layer, row, :, :scored] = weights.amax(dim=1)
            else:
                out[layer, row, :, :scored] = weights.sum(dim=1) / (queries if window == "mean" else 1)
    return out


@cache
def _triton() -> Callable:
    from kernels.attention_score_triton import attention_score_triton

    return attention_score_triton
