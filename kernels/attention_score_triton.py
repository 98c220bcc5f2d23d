"""Attention scores of paged entries by a window of stored queries, and which attend to them at all, in Triton.

Two passes over K: the log-sum-exp of each softmax, then the weights, reduced over the group and the window as they are
made. Only the first kind of number and the scores reach memory.

Sources: Zipage (arXiv 2603.08743), SnapKV (2404.14469), R-KV (2505.24133), FlashAttention-2 (2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.layout import WORD
from kernels.tiles import (
    decode_tile,
    load_blocks,
    load_keys,
    load_softmax_sinks,
    multiprocessors,
    padded_dim,
    score_scale,
)

PROGRAMS_PER_SM = 8
"""Splitting stops once there are this many programs a multiprocessor."""

MIN_SPLIT = 128
"""Entries below which a split costs more than it hides."""

MAX_ROWS = 128
"""Rows (query, query head) of a program; a longer window is taken in chunks. 32 in float32, without tensor cores."""

POINTERS = ("slots_ptr", "ends_ptr", "table_ptr", "lens_ptr")
NUMBERS = ("num_splits", "per_split", "lens_layer_stride", "lens_row_stride", "lens_head_stride")


@triton.jit
def _load_queries(
    q_ptr,
    end,
    first_query,
    group,
    window,
    window_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Queries first_query, ... of the window, each with the heads of the group: [ROWS, DIM_PAD], the head fastest.

    q_ptr is at the KV head's first query head in the request's ring; rows without a query are 0.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    query = first_query + rows // GROUP_PAD
    member = rows % GROUP_PAD
    ring = (end + query) % window
    inside = ((query < window) & (member < group))[:, None] & (dims < HEAD_DIM)[None, :]
    ptrs = q_ptr + (ring * window_stride + member * HEAD_DIM)[:, None] + dims[None, :]
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _softmax_limits(
    first_query,
    group,
    window,
    past,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAXES: tl.constexpr,
    CUT: tl.constexpr,
):
    """Entries that each softmax runs over, int32 [SOFTMAXES]; 0 for those of no query."""
    index = tl.arange(0, SOFTMAXES)
    if SOFTMAXES == ROWS:
        query = first_query + index // GROUP_PAD
        used = (query < window) & (index % GROUP_PAD < group)
    else:
        query = first_query + index
        used = query < window
    if CUT:
        return tl.where(used, past, 0)
    else:
        return tl.where(used, past + query + 1, 0)


@triton.jit
def _tile_logits(
    q,
    k,
    entries,
    limits,
    scale_log2,
    group,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAXES: tl.constexpr,
    GROUP_MEAN: tl.constexpr,
    TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Logits of q [ROWS, DIM_PAD] for k [DIM_PAD, TILE], of base 2: [SOFTMAXES, TILE], -inf from the limits on.

    With fewer softmaxes than rows, the logits of a group are reduced to one. `scale_log2` is `score_scale`'s.
    """
    logits = tl.dot(q, k, input_precision="ieee") * scale_log2
    if SOFT_CAP is not None:
        logits = (2.0 * tl.sigmoid(2.0 * logits) - 1.0) * (SOFT_CAP * 1.4426950408889634)  # tanh
    if SOFTMAXES != ROWS:
        logits = tl.reshape(logits, [SOFTMAXES, GROUP_PAD, TILE])
        if GROUP_MEAN:
            logits = tl.sum(logits, 1) / group
        else:
            member = tl.arange(0, GROUP_PAD)[None, :, None]
            logits = tl.max(tl.where(member < group, logits, float("-inf")), 1)
    return tl.where(entries[None, :] < limits[:, None], logits, float("-inf"))


@triton.jit(do_not_specialize=[*POINTERS, *NUMBERS])
def _log_sums(
    q_ptr,
    k_ptr,
    slots_ptr,
    ends_ptr,
    table_ptr,
    lens_ptr,
    sums_ptr,
    scale_log2,
    group,
    window,
    num_splits,
    per_split,
    q_layer_stride,
    q_slot_stride,
    window_stride,
    layer_stride,
    block_stride,
    head_stride,
    table_layer_stride,
    table_row_stride,
    table_head_stride,
    lens_layer_stride,
    lens_row_stride,
    lens_head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAXES: tl.constexpr,
    GROUP_MEAN: tl.constexpr,
    CUT: tl.constexpr,
    TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """One layer, request, KV head, chunk of the window and split: log2 of the sum of each softmax over the split."""
    split = tl.program_id(0) % num_splits
    chunk = tl.program_id(0) // num_splits
    pair = tl.program_id(1)
    row = pair // HEADS
    head = pair % HEADS
    layer = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    first_query = chunk * (ROWS // GROUP_PAD)

    slot = tl.load(slots_ptr + row).to(tl.int64)
    q_heads = q_ptr + layer * q_layer_stride + slot * q_slot_stride + head * group * HEAD_DIM
    q = _load_queries(
        q_heads, tl.load(ends_ptr + row), first_query, group, window, window_stride, HEAD_DIM, DIM_PAD, GROUP_PAD, ROWS
    )
    limits = _softmax_limits(first_query, group, window, length - window, GROUP_PAD, ROWS, SOFTMAXES, CUT)
    k_head = k_ptr + layer * layer_stride + head * head_stride
    table = table_ptr + layer * table_layer_stride + row.to(tl.int64) * table_row_stride + head * table_head_stride

    running = tl.full([SOFTMAXES], float("-inf"), tl.float32)
    total = tl.zeros([SOFTMAXES], tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, tl.cdiv(length, TILE))
    blocks = load_blocks(table, first * TILE, length, BLOCK_SIZE, TILE)
    for tile in range(first, last):
        next_blocks = load_blocks(table, (tile + 1) * TILE, length, BLOCK_SIZE, TILE)
        k = load_keys(k_head, blocks, block_stride, tile * TILE, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE)
        entries = tile * TILE + tl.arange(0, TILE)
        logits = _tile_logits(
            q, k, entries, limits, scale_log2, group, GROUP_PAD, ROWS, SOFTMAXES, GROUP_MEAN, TILE, SOFT_CAP
        )  # fmt: skip
        highest = tl.maximum(running, tl.max(logits, 1))
        base = tl.where(highest > float("-inf"), highest, 0.0)
        total = total * tl.exp2(running - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        running = highest
        blocks = next_blocks

    log_sum = tl.where(total > 0, running + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    chunks = tl.num_programs(0) // num_splits
    place = ((layer * tl.num_programs(1) + pair) * chunks + chunk) * SOFTMAXES + tl.arange(0, SOFTMAXES)
    tl.store(sums_ptr + place * num_splits + split, log_sum)


@triton.jit(do_not_specialize=[*POINTERS, *NUMBERS, "chunk"])
def _reduce_weights(
    q_ptr,
    k_ptr,
    slots_ptr,
    ends_ptr,
    table_ptr,
    lens_ptr,
    sums_ptr,
    sinks_ptr,
    out_ptr,
    threshold,
    scale_log2,
    group,
    window,
    num_splits,
    per_split,
    chunk,
    chunks,
    width,
    q_layer_stride,
    q_slot_stride,
    window_stride,
    layer_stride,
    block_stride,
    head_stride,
    table_layer_stride,
    table_row_stride,
    table_head_stride,
    lens_layer_stride,
    lens_row_stride,
    lens_head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAXES: tl.constexpr,
    GROUP_MEAN: tl.constexpr,
    CUT: tl.constexpr,
    TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """One layer, request, KV head and split of the output's columns, for one chunk of the window.

    Chunks are launches, one after the other, that accumulate in the output; the LAST one finishes it. "bits" writes
    int32 masks: that of a query is its weight's being `threshold` or more.
    """
    split = tl.program_id(0)
    pair = tl.program_id(1)
    row = pair // HEADS
    head = pair % HEADS
    layer = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    first_query = chunk * (ROWS // GROUP_PAD)
    index = layer * tl.num_programs(1) + pair

    parts = tl.arange(0, SPLITS_PAD)
    place = (index * chunks + chunk) * SOFTMAXES + tl.arange(0, SOFTMAXES)
    sums = tl.load(
        sums_ptr + place[:, None] * num_splits + parts[None, :],
        mask=(parts < num_splits)[None, :] & (tl.arange(0, SOFTMAXES) >= 0)[:, None],
        other=float("-inf"),
    )
    highest = tl.max(sums, 1)
    if sinks_ptr is not None:
        heads = layer * HEADS * group + head * group
        sinks = load_softmax_sinks(sinks_ptr + heads, group, GROUP_PAD, ROWS, SOFTMAXES, GROUP_MEAN)
        highest = tl.maximum(highest, sinks)
    base = tl.where(highest > float("-inf"), highest, 0.0)
    total = tl.sum(tl.exp2(sums - base[:, None]), 1)
    if sinks_ptr is not None:
        total += tl.exp2(sinks - base)
    # A softmax over nothing, of padding or of a window without a past, gives every entry 2^-inf.
    log_sum = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))

    slot = tl.load(slots_ptr + row).to(tl.int64)
    q_heads = q_ptr + layer * q_layer_stride + slot * q_slot_stride + head * group * HEAD_DIM
    q = _load_queries(
        q_heads, tl.load(ends_ptr + row), first_query, group, window, window_stride, HEAD_DIM, DIM_PAD, GROUP_PAD, ROWS
    )
    limits = _softmax_limits(first_query, group, window, length - window, GROUP_PAD, ROWS, SOFTMAXES, CUT)
    k_head = k_ptr + layer * layer_stride + head * head_stride
    table = table_ptr + layer * table_layer_stride + row.to(tl.int64) * table_row_stride + head * table_head_stride
    out_row = out_ptr + index * width
    scored = length - window if CUT else length

    first = split * per_split
    end = tl.minimum(first + per_split, tl.cdiv(width, TILE))
    last = tl.minimum(end, tl.cdiv(length, TILE))
    blocks = load_blocks(table, first * TILE, length, BLOCK_SIZE, TILE)
    for tile in range(first, last):
        next_blocks = load_blocks(table, (tile + 1) * TILE, length, BLOCK_SIZE, TILE)
        k = load_keys(k_head, blocks, block_stride, tile * TILE, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE)
        entries = tile * TILE + tl.arange(0, TILE)
        logits = _tile_logits(
            q, k, entries, limits, scale_log2, group, GROUP_PAD, ROWS, SOFTMAXES, GROUP_MEAN, TILE, SOFT_CAP
        )  # fmt: skip
        weights = tl.exp2(logits - log_sum[:, None])
        if SOFTMAXES == ROWS:
            weights = tl.reshape(weights, [ROWS // GROUP_PAD, GROUP_PAD, TILE])
            if GROUP_MEAN:
                weights = tl.sum(weights, 1) / group
            else:
                weights = tl.max(weights, 1)
        if WINDOW == "max":
            score = tl.max(weights, 0)
        elif WINDOW == "bits":
            bits = tl.full([ROWS // GROUP_PAD], 1, tl.int32) << ((first_query + tl.arange(0, ROWS // GROUP_PAD)) % 32)
            score = tl.sum(tl.where(weights >= threshold, bits[:, None], 0), 0)
        else:
            score = tl.sum(weights, 0)
        if not FIRST:
            before = tl.load(out_row + entries, mask=entries < width, other=0)
            if WINDOW == "max":
                score = tl.maximum(score, before)
            else:
                score += before
        if LAST and WINDOW != "bits":
            if WINDOW == "mean":
                score = score / window
            score = tl.where(entries < scored, score, float("-inf"))
        tl.store(out_row + entries, score, mask=entries < width)
        blocks = next_blocks
    for tile in range(tl.maximum(first, last), end):
        entries = tile * TILE + tl.arange(0, TILE)
        if WINDOW == "bits":
            tl.store(out_row + entries, tl.zeros([TILE], tl.int32), mask=entries < width)
        else:
            tl.store(out_row + entries, tl.full([TILE], float("-inf"), tl.float32), mask=entries < width)


def attention_score_triton(
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
    num_splits: int | None = None,
) -> Tensor:
    """`attention_score` in two launches, and one more for each further chunk of a long window.

    Args:
        num_splits: of a request along its entries; None: enough to fill the GPU. The others as in `attention_score`.
    """
    out = torch.empty((1, *view.lens.shape, view.width), dtype=torch.float32, device=q_cache.device)
    form = soft_cap, sinks
    _launch(out, q_cache, view, query_slots, window_ends, scale, softmax, group, window, *form, num_splits)
    return out[0]


def attended_triton(
    q_cache: Tensor,
    view: CacheView,
    query_slots: Tensor,
    window_ends: Tensor,
    scale: float,
    threshold: float,
    *,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """`attended` in the launches of `attention_score_triton`."""
    words = triton.cdiv(q_cache.shape[2], WORD)
    out = torch.empty((words, *view.lens.shape, view.width), dtype=torch.int32, device=q_cache.device)
    form = soft_cap, sinks
    _launch(out, q_cache, view, query_slots, window_ends, scale, "all", "max", "bits", *form, num_splits, threshold)
    return out


def _launch(
    out: Tensor,
    q_cache: Tensor,
    view: CacheView,
    query_slots: Tensor,
    window_ends: Tensor,
    scale: float,
    softmax: str,
    group: str,
    window: str,
    soft_cap: float | None,
    sinks: Tensor | None,
    num_splits: int | None,
    threshold: float = 0.0,
) -> None:
    """Fill `out` [words, L, R, H, N], each word by the chunks of its own queries: one word, or WORD queries each."""
    if out.numel() == 0:
        return
    k_cache, _, block_tables, lens = view
    layers, _, kv_heads, block_size, head_dim = k_cache.shape
    queries, query_heads = q_cache.shape[2:4]
    requests, width = lens.shape[1], view.width
    members = query_heads // kv_heads
    group_pad = triton.next_power_of_2(members)
    most = max(group_pad, 32 if k_cache.element_size() == 4 else MAX_ROWS)
    if window == "bits":
        most = min(most, WORD * group_pad)
    rows = max(16, min(triton.next_power_of_2(queries) * group_pad, most))
    softmaxes = rows // group_pad if softmax == "group_cut" else rows
    chunks = triton.cdiv(queries, rows // group_pad)
    options = decode_tile(head_dim, k_cache.element_size())
    options["num_warps"] = 8 if rows > 64 else 4
    tiles = triton.cdiv(width, options["TILE"])
    pairs = requests * kv_heads
    if num_splits is None:
        wanted = triton.cdiv(PROGRAMS_PER_SM * multiprocessors(k_cache.device), layers * pairs)
        num_splits = max(1, min(wanted, width // MIN_SPLIT))
    per_split = triton.cdiv(tiles, num_splits)
    num_splits = triton.cdiv(tiles, per_split)
    sums = torch.empty((layers * pairs, chunks, softmaxes, num_splits), dtype=torch.float32, device=k_cache.device)
    inputs = q_cache, k_cache, query_slots, window_ends, block_tables, lens, sums
    tables = *block_tables.stride()[:3], *lens.stride()
    strides = *q_cache.stride()[:3], *k_cache.stride()[:3], *tables
    shape = {
        "HEADS": kv_heads, "HEAD_DIM": head_dim, "DIM_PAD": padded_dim(head_dim), "BLOCK_SIZE": block_size,
        "GROUP_PAD": group_pad, "ROWS": rows, "SOFTMAXES": softmaxes, "GROUP_MEAN": group == "mean",
        "CUT": softmax != "all", "SOFT_CAP": soft_cap, **options,
    }  # fmt: skip
    numbers = score_scale(scale, soft_cap), members, queries, num_splits, per_split
    _log_sums[(num_splits * chunks, pairs, layers)](*inputs, *numbers, *strides, **shape)
    per_word = triton.cdiv(WORD, rows // group_pad) if window == "bits" else chunks
    for chunk in range(chunks):
        _reduce_weights[(num_splits, pairs, layers)](
            *inputs, sinks, out[chunk // per_word], threshold, *numbers, chunk, chunks, width, *strides, **shape,
            SPLITS_PAD=triton.next_power_of_2(num_splits), WINDOW=window, FIRST=chunk % per_word == 0,
            LAST=chunk == chunks - 1,
        )  # fmt: skip
