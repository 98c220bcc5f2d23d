"""Split-KV flash decoding over block tables, in Triton.

Sources: Flash-Decoding (https://pytorch.org/blog/flash-decoding/), PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles import LOG2_E, attend_tile, load_blocks, multiprocessors, padded_dim

PROGRAMS_PER_SM = 3
"""Programs that a multiprocessor holds at once, by their shared memory on Hopper: splitting fills them, no more."""

MIN_SPLIT = 128
"""Entries below which a split costs more than it hides."""


@triton.jit
def _splits_in_use(length, num_splits, TILE: tl.constexpr, MIN_TILES: tl.constexpr):
    """(tiles of a request, tiles of one split). A split past the request's tiles is empty."""
    tiles = tl.cdiv(length, TILE)
    return tiles, tl.maximum(tl.cdiv(tiles, num_splits), MIN_TILES)


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", "max_ptr", "sum_ptr", "num_splits", "group", "table_stride"])
def _attend_splits(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    out_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    scale_log2,
    num_splits,
    group,
    q_row_stride,
    q_head_stride,
    block_stride,
    head_stride,
    table_stride,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One request, KV head and split: all query heads of the KV head are the rows of one tile."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lens_ptr + row)
    tiles, per_split = _splits_in_use(length, num_splits, TILE, MIN_TILES)
    first = split * per_split
    last = tl.minimum(first + per_split, tiles)
    if not WHOLE and first >= tiles:
        return

    member = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM_PAD)
    heads = head * group + member
    inside = (member < group)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + row * q_row_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    limits = tl.zeros([GROUP_PAD], tl.int32) + length
    k_head = k_ptr + head * head_stride
    v_head = v_ptr + head * head_stride
    table = table_ptr + row * table_stride

    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    row_max = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    row_sum = tl.zeros([GROUP_PAD], tl.float32)
    blocks = load_blocks(table, first * TILE, length, BLOCK_SIZE, TILE)
    for tile in range(first, last):
        next_blocks = load_blocks(table, (tile + 1) * TILE, length, BLOCK_SIZE, TILE)
        acc, row_max, row_sum = attend_tile(
            q, acc, row_max, row_sum, k_head, v_head, blocks, block_stride, tile * TILE, length, limits, scale_log2,
            HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE, True,
        )  # fmt: skip
        blocks = next_blocks

    head_row = row * tl.num_programs(1) * group + heads
    if WHOLE:
        out = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
        tl.store(out_ptr + head_row[:, None] * HEAD_DIM + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = head_row * num_splits + split
        tl.store(acc_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
        tl.store(max_ptr + part, row_max, mask=member < group)
        tl.store(sum_ptr + part, row_sum, mask=member < group)


@triton.jit(do_not_specialize=["max_ptr", "sum_ptr", "lens_ptr", "num_splits"])
def _combine_splits(
    acc_ptr,
    max_ptr,
    sum_ptr,
    lens_ptr,
    out_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One request and query head: add its splits, rescaled to their common maximum. Empty splits wrote nothing."""
    row = tl.program_id(0).to(tl.int64)
    head_row = row * tl.num_programs(1) + tl.program_id(1)
    tiles, per_split = _splits_in_use(tl.load(lens_ptr + row), num_splits, TILE, MIN_TILES)
    used = tl.cdiv(tiles, per_split)
    dims = tl.arange(0, DIM_PAD)

    acc = tl.zeros([DIM_PAD], tl.float32)
    all_max = float("-inf")
    all_sum = 0.0
    for start in range(0, used, CHUNK):
        split = start + tl.arange(0, CHUNK)
        part = head_row * num_splits + split
        split_max = tl.load(max_ptr + part, mask=split < used, other=float("-inf"))
        split_sum = tl.load(sum_ptr + part, mask=split < used, other=0.0)
        inside = (split < used)[:, None] & (dims < HEAD_DIM)[None, :]
        split_acc = tl.load(acc_ptr + part[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
        new_max = tl.maximum(all_max, tl.max(split_max, 0))
        weights = tl.exp2(split_max - new_max)
        shrink = tl.exp2(all_max - new_max)
        acc = acc * shrink + tl.sum(split_acc * weights[:, None], 0)
        all_sum = all_sum * shrink + tl.sum(split_sum * weights, 0)
        all_max = new_max
    out = acc / tl.where(all_sum > 0, all_sum, 1.0)
    tl.store(out_ptr + head_row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def tile_config(head_dim: int, element_size: int) -> dict[str, int]:
    """Entries a tile, and Triton's launch options: tiles of 8 to 16 KB, so that three programs share a multiprocessor.

    Args:
        head_dim: of the caches.
        element_size: bytes; 4 has no tensor cores (exact float32).
    """
    dim = padded_dim(head_dim)
    if element_size == 4:
        return {"TILE": 32 if dim <= 64 else 16, "num_warps": 4, "num_stages": 2}
    return {"TILE": 128 if dim <= 64 else 64 if dim <= 128 else 32, "num_warps": 4, "num_stages": 3}


def choose_splits(pairs: int, bound: int, multiprocessors: int) -> int:
    """Splits of a request: few (request, KV head) pairs are split until they fill the GPU.

    Args:
        pairs: requests times KV heads.
        bound: entries that the block tables have room for. Not the cache lengths: those are on the device, and a
            launch of fixed shape can be replayed in a CUDA graph.
        multiprocessors: of the GPU.
    """
    wanted = PROGRAMS_PER_SM * multiprocessors // pairs
    return max(1, min(wanted, triton.cdiv(bound, MIN_SPLIT)))


def paged_decode_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cache_lens: Tensor,
    scale: float,
    num_splits: int | None = None,
) -> Tensor:
    """`reference.paged_decode` in one launch, or two when the requests are split along their entries.

    Args:
        q: [B, Hq, d], last dimension contiguous.
        k_cache, v_cache: [num_blocks, H, b, d], one layer, of q's dtype.
        block_tables: int32 [B, max_blocks].
        cache_lens: int32 [B].
        scale: of the scores.
        num_splits: None lets `choose_splits` decide.

    Returns:
        [B, Hq, d], contiguous, q's dtype.
    """
    batch, query_heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    out = torch.empty((batch, query_heads, head_dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    if num_splits is None:
        bound = block_tables.shape[1] * block_size
        num_splits = choose_splits(batch * kv_heads, bound, multiprocessors(q.device))
    options = tile_config(head_dim, q.element_size())
    tile, dim_pad = options["TILE"], padded_dim(head_dim)
    min_tiles = max(1, MIN_SPLIT // tile)
    group = query_heads // kv_heads
    whole = num_splits == 1
    parts = 0 if whole else batch * query_heads * num_splits
    acc = torch.empty((parts, head_dim), dtype=torch.float32, device=q.device)
    maxima, sums = torch.empty((2, parts), dtype=torch.float32, device=q.device)

    _attend_splits[(batch, kv_heads, num_splits)](
        q, k_cache, v_cache, block_tables, cache_lens, out, acc, maxima, sums,
        scale * LOG2_E, num_splits, group,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), block_tables.stride(0),
        GROUP_PAD=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim, DIM_PAD=dim_pad,
        BLOCK_SIZE=block_size, MIN_TILES=min_tiles, WHOLE=whole, **options,
    )  # fmt: skip
    if not whole:
        _combine_splits[(batch, query_heads)](
            acc, maxima, sums, cache_lens, out, num_splits,
            HEAD_DIM=head_dim, DIM_PAD=dim_pad, TILE=tile, MIN_TILES=min_tiles, CHUNK=16, num_warps=4,
        )  # fmt: skip
    return out
