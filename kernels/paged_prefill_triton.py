"""Causal attention of new queries over paged entries, requests of any length side by side, in Triton.

Sources: FlashAttention-2 (arXiv 2307.08691), PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView
from kernels.layout import given_or_new
from kernels.tiles import (
    attend_tile,
    has_large_shared_memory,
    load_blocks,
    load_sinks,
    padded_dim,
    score_scale,
)

POINTERS = ("table_ptr", "starts_ptr", "lens_ptr")
NUMBERS = ("group", "table_row_stride", "table_head_stride", "lens_row_stride", "lens_head_stride")


@triton.jit(do_not_specialize=[*POINTERS, *NUMBERS])
def _attend_chunks(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    starts_ptr,
    lens_ptr,
    out_ptr,
    sinks_ptr,
    scale_log2,
    group,
    q_row_stride,
    q_head_stride,
    block_stride,
    head_stride,
    table_row_stride,
    table_head_stride,
    lens_row_stride,
    lens_head_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """One request, query head and tile of QUERIES queries."""
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2)
    begin = tl.load(starts_ptr + row)
    queries = tl.load(starts_ptr + row + 1) - begin
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # the longest work starts first
    if first_query >= queries:
        return
    kv_head = head // group
    length = tl.load(lens_ptr + row * lens_row_stride + kv_head * lens_head_stride)
    past = length - queries

    index = first_query + tl.arange(0, QUERIES)
    dims = tl.arange(0, DIM_PAD)
    inside = (index < queries)[:, None] & (dims < HEAD_DIM)[None, :]
    token = (begin + index).to(tl.int64)
    q_ptrs = q_ptr + token[:, None] * q_row_stride + head * q_head_stride + dims[None, :]
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    limits = past + index + 1
    k_head = k_ptr + kv_head * head_stride
    v_head = v_ptr + kv_head * head_stride
    table = table_ptr + row * table_row_stride + kv_head * table_head_stride

    acc = tl.zeros([QUERIES, DIM_PAD], tl.float32)
    row_max = tl.full([QUERIES], float("-inf"), tl.float32)
    row_sum = tl.zeros([QUERIES], tl.float32)
    if sinks_ptr is not None:
        row_max = tl.zeros([QUERIES], tl.float32) + load_sinks(sinks_ptr, head, True)
        row_sum += 1.0
    masked_from = (past + first_query + 1) // TILE
    seen_by_any = tl.cdiv(tl.minimum(past + first_query + QUERIES, length), TILE)
    if WINDOW is None:
        blocks = load_blocks(table, 0, length, BLOCK_SIZE, TILE)
        for tile in range(0, masked_from):
            next_blocks = load_blocks(table, (tile + 1) * TILE, length, BLOCK_SIZE, TILE)
            acc, row_max, row_sum = attend_tile(
                q, acc, row_max, row_sum, k_head, v_head, blocks, block_stride, tile * TILE, length, limits, scale_log2,
                HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE, False, WINDOW, SOFT_CAP,
            )  # fmt: skip
            blocks = next_blocks
    else:
        # From the first query's window on, and a window's edges lie in most tiles.
        masked_from = tl.maximum(past + first_query + 1 - WINDOW, 0) // TILE
        blocks = load_blocks(table, masked_from * TILE, length, BLOCK_SIZE, TILE)
    for tile in range(masked_from, seen_by_any):
        next_blocks = load_blocks(table, (tile + 1) * TILE, length, BLOCK_SIZE, TILE)
        acc, row_max, row_sum = attend_tile(
            q, acc, row_max, row_sum, k_head, v_head, blocks, block_stride, tile * TILE, length, limits, scale_log2,
            HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE, True, WINDOW, SOFT_CAP,
        )  # fmt: skip
        blocks = next_blocks

    if WINDOW is not None:  # rows past the last query may see nothing
        row_sum = tl.where(row_sum > 0, row_sum, 1.0)
    out = acc / row_sum[:, None]
    out_ptrs = out_ptr + (token[:, None] * tl.num_programs(2) + head) * HEAD_DIM + dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


def tile_config(head_dim: int, element_size: int, large: bool) -> dict[str, int]:
    """Queries and entries a tile, and Triton's launch options, by what registers and shared memory hold.

    Args:
        head_dim: of the caches.
        element_size: bytes; 4 has no tensor cores (exact float32), so its tiles are small.
        large: `has_large_shared_memory`, hence warpgroup matrix instructions; otherwise 99 KB must do.
    """
    dim = padded_dim(head_dim)
    if element_size == 4:
        queries, tile, warps, stages = (64, 32, 8, 2) if dim <= 64 else (32, 16, 8, 2)
    elif dim <= 64:
        queries, tile, warps, stages = (128, 64, 4 if large else 8, 3)
    elif dim <= 128:
        queries, tile, warps, stages = (128, 64, 8, 3 if large else 2)
    else:
        queries, tile, warps, stages = (128 if large else 64, 32, 8, 2)
    return {"QUERIES": queries, "TILE": tile, "num_warps": warps, "num_stages": stages}


def paged_prefill_triton(
    q: Tensor,
    view: CacheView,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    out: Tensor | None = None,
    form: AttentionForm = PLAIN,
) -> Tensor:
    """`paged_prefill` in one launch; rows of a request past `max_seqlen` are left unwritten."""
    k_cache, v_cache, block_tables, lens = view
    query_heads, head_dim = q.shape[1:]
    kv_heads, block_size = k_cache.shape[1:3]
    batch = lens.shape[0]
    out = given_or_new(out, q)
    if max_seqlen == 0 or batch == 0:
        return out
    options = tile_config(head_dim, q.element_size(), has_large_shared_memory(q.device))
    _attend_chunks[(triton.cdiv(max_seqlen, options["QUERIES"]), batch, query_heads)](
        q, k_cache, v_cache, block_tables, cu_seqlens, lens, out, form.sinks,
        score_scale(scale, form.soft_cap), query_heads // kv_heads,
        *q.stride()[:2], *k_cache.stride()[:2], *block_tables.stride()[:2], *lens.stride(),
        HEAD_DIM=head_dim, DIM_PAD=padded_dim(head_dim), BLOCK_SIZE=block_size,
        WINDOW=form.window, SOFT_CAP=form.soft_cap, **options,
    )  # fmt: skip
    return out
