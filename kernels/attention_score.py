"""How much a window of stored queries attends to paged entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import CacheView, check_view, entries_reference, gather_entries, scores_like
from kernels.layout import check_choice, check_index, check_like, fail

REDUCTIONS = {"max": torch.amax, "mean": torch.mean, "sum": torch.sum}


def attention_score(
    q_cache: Tensor,
    view: CacheView,
    query_slots: Tensor,
    window_ends: Tensor,
    scale: float,
    *,
    softmax: str = "all",
    group: str = "max",
    window: str = "mean",
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What a request's last w queries, the tokens of its last w entries, think of each of its n entries.

    A softmax of each query over the entries, then `group` over the query heads of a KV head, then `window` over the
    queries. Zipage (arXiv 2603.08743) and G-KV (2512.00504) use (all, max, mean), SnapKV (2404.14469) (all, mean,
    mean), R-KV (2505.24133) (group_cut, max, mean), MorphKV (2503.00979) (cut, max, sum or max).

    Args:
        q_cache: [L, num_query_slots, w, Hq, d], each layer contiguous, of k_cache's dtype; Hq a multiple of H.
        view: any range of layers; lengths n are at least w, or 0 for what is left out. V is not read.
        query_slots: int32 [R].
        window_ends: int32 [R]; the last query of the window is that of logical position end - 1, and end >= w.
        scale: of the logits, before the softmax.
        softmax: "all": over the entries that a query sees, itself included; "cut": over the entries before the
            window; "group_cut": the same of the logits reduced by `group`, one softmax a KV head.
        group: "max" or "mean".
        window: "mean", "sum" or "max".
        soft_cap: c, where logits x become c * tanh(x / c); None: they stay.
        sinks: float [L, Hq], contiguous: logits that take their share of each softmax and have no score; with
            "group_cut" reduced by `group` as the others. None: there are none.

    Returns:
        float32 [L, R, H, max_blocks * b]; -inf past n, and in the window's own columns where they are cut.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    check_window(q_cache, view, query_slots, window_ends, soft_cap, sinks)
    check_choice("softmax", softmax, ("all", "cut", "group_cut"))
    check_choice("group", group, ("max", "mean"))
    check_choice("window", window, ("mean", "sum", "max"))
    args = q_cache, view, query_slots, window_ends, scale
    kinds = {"softmax": softmax, "group": group, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    if q_cache.is_cuda:
        with torch.cuda.device(q_cache.device):
            return _triton()(*args, **kinds)
    return attention_score_torch(*args, **kinds)


def check_window(
    q_cache: Tensor,
    view: CacheView,
    query_slots: Tensor,
    window_ends: Tensor,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    """Check a window of queries, a view, and what the softmax is beside plain. Raises ValueError naming the argument,
    its value and the remedy.
    """
    check_view(view, all_layers=True)
    k_cache = view.k_cache
    layers, _, heads, _, head_dim = k_cache.shape
    shape = tuple(q_cache.shape)
    if q_cache.dim() != 5 or shape[0] != layers or shape[4] != head_dim or 0 in shape[2:] or shape[3] % heads:
        fail("q_cache", "shape", shape, f"give [{layers}, slots, window, a multiple of {heads} heads, {head_dim}]")
    check_like("q_cache", q_cache, k_cache)
    if not q_cache[0].is_contiguous():
        fail("q_cache", "stride", q_cache.stride(), "make each layer contiguous")
    requests = view.lens.shape[1]
    check_index("query_slots", query_slots, torch.int32, (requests,), k_cache.device)
    check_index("window_ends", window_ends, torch.int32, (requests,), k_cache.device)
    if soft_cap is not None and not soft_cap > 0:
        fail("soft_cap", "value", soft_cap, "give a number above 0, or None")
    if sinks is None:
        return
    if sinks.shape != (layers, shape[3]) or not sinks.is_floating_point() or not sinks.is_contiguous():
        what = tuple(sinks.shape), sinks.dtype, sinks.stride()
        fail("sinks", "shape, dtype and stride", what, f"give floats [{layers}, {shape[3]}], contiguous")
    if sinks.device != k_cache.device:
        fail("sinks", "device", sinks.device, f"move it to {k_cache.device}, where the caches are")


def capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """c * tanh(x / c) of logits x; None: they stay."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def shares(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, of which sinks, float32 [...] of the others, take their share."""
    if sinks is None:
        return logits.softmax(dim=-1)
    sinks = sinks.expand(logits.shape[:-1])[..., None]
    return torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]


def attention_score_reference(
    q_cache: Tensor,
    view: CacheView,
    query_slots: Tensor,
    window_ends: Tensor,
    scale: float,
    *,
    softmax: str = "all",
    group: str = "max",
    window: str = "mean",
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attention_score`, layer by layer and request by request."""
    window_size, query_heads = q_cache.shape[2:4]
    group_size = query_heads // view.k_cache.shape[2]
    reduce_group, reduce_window = REDUCTIONS[group], REDUCTIONS[window]
    out = scores_like(view).cpu()
    for layer, row, head in product(*map(range, view.lens.shape)):
        length = int(view.lens[layer, row, head])
        if length == 0:
            continue
        places = (int(window_ends[row]) - window_size + torch.arange(window_size)) % window_size
        heads = slice(head * group_size, (head + 1) * group_size)
        queries = q_cache[layer, int(query_slots[row]), :, heads].cpu()[places].float()
        keys = entries_reference(view.k_cache[layer], view.block_tables[layer, row, head], length, head).cpu()
        logits = capped(torch.einsum("qgd,jd->gqj", queries, keys) * scale, soft_cap)
        of_heads = None if sinks is None else sinks[layer, heads].cpu().float()[:, None]
        past = length - window_size
        if softmax == "all":
            hidden = torch.arange(length) > past + torch.arange(window_size)[:, None]
            weights = reduce_group(shares(logits.masked_fill(hidden, float("-inf")), of_heads), 0)
        elif softmax == "cut":
            weights = reduce_group(shares(logits[..., :past], of_heads), 0)
        else:
            of_group = None if sinks is None else reduce_group(of_heads, 0)
            weights = shares(reduce_group(logits[..., :past], 0), of_group)
        out[layer, row, head, : weights.shape[-1]] = reduce_window(weights, 0)
    return out.to(view.k_cache.device)


def attention_score_torch(
    q_cache: Tensor,
    view: CacheView,
    query_slots: Tensor,
    window_ends: Tensor,
    scale: float,
    *,
    softmax: str = "all",
    group: str = "max",
    window: str = "mean",
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attention_score`, a matrix product for each layer and request."""
    queries, query_heads, head_dim = q_cache.shape[2:]
    kv_heads = view.k_cache.shape[2]
    group_size = query_heads // kv_heads
    out = scores_like(view)
    caches, slots = view.k_cache.unbind(), query_slots.tolist()
    windows = q_cache.view(*q_cache.shape[:3], kv_heads, group_size, head_dim).unbind()
    order = torch.arange(queries)
    rings = ((window_ends[:, None] - queries + order) % queries).unbind()
    hidden = order > order[:, None]
    reduce_group = torch.amax if group == "max" else torch.mean
    for layer, row, heads, length, table in view.lines():
        past = length - queries
        scored = length if softmax == "all" else past
        q = windows[layer][slots[row], :, heads].index_select(0, rings[row])
        q = (q.float() * scale).permute(1, 2, 0, 3).flatten(1, 2)
        keys = gather_entries(caches[layer], table, length, heads)[:, 0, :scored].float()
        logits = capped(torch.bmm(q, keys.transpose(1, 2)).view(len(q), group_size, queries, scored), soft_cap)
        of_heads = None if sinks is None else sinks[layer].float().view(kv_heads, group_size, 1)[heads]
        if softmax == "all":
            logits[..., past:].masked_fill_(hidden, float("-inf"))
        if softmax == "group_cut":
            weights = shares(reduce_group(logits, 1), None if sinks is None else reduce_group(of_heads, 1))
        else:
            weights = reduce_group(shares(logits, of_heads), 1)
        if window == "max":
            out[layer, row, heads, :scored] = weights.amax(dim=1)
        else:
            out[layer, row, heads, :scored] = weights.sum(dim=1) / (queries if window == "mean" else 1)
    return out


@cache
def _triton() -> Callable:
    from kernels.attention_score_triton import attention_score_triton

    return attention_score_triton
