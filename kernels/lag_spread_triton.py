"""How far an entry's channels spread over the range that they have in the partition after it, in Triton.

A program has one layer, request, KV head and partition, of keys or of values. It reads the next partition for the
ranges, then its own: each entry is read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.tiles import padded_dim

TILE_BYTES = 32 * 1024
"""Of a tile of entries in float32."""

STRIDES = tuple(f"{of}_{by}_stride" for of in ("table", "lens", "start") for by in ("layer", "row", "head"))


@triton.jit
def _load(
    head_ptr,
    table,
    slots,
    inside,
    block_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entries at `slots` [TILE], one a row, float32 [TILE, DIM_PAD]; only those `inside` are read."""
    dims = tl.arange(0, DIM_PAD)
    blocks = tl.load(table + slots // BLOCK, mask=inside, other=0).to(tl.int64)
    offsets = blocks * block_stride + slots % BLOCK * HEAD_DIM
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(head_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", "starts_ptr", *STRIDES])
def _lag_spread(
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    starts_ptr,
    out_ptr,
    width,
    layer_stride,
    block_stride,
    head_stride,
    table_layer_stride,
    table_row_stride,
    table_head_stride,
    lens_layer_stride,
    lens_row_stride,
    lens_head_stride,
    start_layer_stride,
    start_row_stride,
    start_head_stride,
    partition,
    least_range,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    number = tl.program_id(0)
    pair = tl.program_id(1)
    layer = (tl.program_id(2) // 2).to(tl.int64)
    of_values = tl.program_id(2) % 2
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    start = tl.load(starts_ptr + layer * start_layer_stride + row * start_row_stride + head * start_head_stride)
    first = start + number * partition
    if first + 2 * partition > length:
        return
    base = k_ptr if of_values == 0 else v_ptr
    head_ptr = base + layer * layer_stride + head * head_stride
    table = table_ptr + layer * table_layer_stride + row * table_row_stride + head * table_head_stride
    places, dims = tl.arange(0, TILE), tl.arange(0, DIM_PAD)

    low = tl.full([DIM_PAD], float("inf"), tl.float32)
    high = tl.full([DIM_PAD], float("-inf"), tl.float32)
    for at in range(0, partition, TILE):
        inside = at + places < partition
        x = _load(head_ptr, table, first + partition + at + places, inside, block_stride, HEAD_DIM, DIM_PAD, BLOCK_SIZE)
        low = tl.minimum(low, tl.min(tl.where(inside[:, None], x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside[:, None], x, float("-inf")), 0))
    range_ = high - low
    is_flat = range_ <= least_range * tl.maximum(tl.abs(low), tl.abs(high))
    scale = tl.where(is_flat | (dims >= HEAD_DIM), 0.0, 1.0 / tl.where(is_flat, 1.0, range_))

    line = of_values * (tl.num_programs(2) // 2) + layer
    out = out_ptr + (line * tl.num_programs(1) + pair) * width
    for at in range(0, partition, TILE):
        inside = at + places < partition
        x = _load(head_ptr, table, first + at + places, inside, block_stride, HEAD_DIM, DIM_PAD, BLOCK_SIZE)
        x = (x - low[None, :]) * scale[None, :]
        mean = tl.sum(x, 1) / HEAD_DIM
        apart = tl.where((dims < HEAD_DIM)[None, :], x - mean[:, None], 0.0)
        std = tl.sqrt(tl.sum(apart * apart, 1) / (HEAD_DIM - 1))
        tl.store(out + first + at + places, std, mask=inside)


def lag_spread_triton(view: CacheView, starts: Tensor, partition: int, least_range: float) -> Tensor:
    """`kernels.lag_spread` on CUDA, or interpreted; `least_range` is its `LEAST_RANGE`."""
    layers, requests, heads = view.lens.shape
    out = torch.zeros(2, layers, requests, heads, view.width, device=view.lens.device)
    most = view.width // partition - 1
    if most < 1:
        return out
    head_dim, block_size = view.k_cache.shape[-1], view.k_cache.shape[-2]
    tile = min(triton.next_power_of_2(partition), max(16, TILE_BYTES // (4 * padded_dim(head_dim))))
    _lag_spread[(most, requests * heads, 2 * layers)](
        view.k_cache,
        view.v_cache,
        view.block_tables,
        view.lens,
        starts,
        out,
        view.width,
        *view.k_cache.stride()[:3],
        *view.block_tables.stride()[:3],
        *view.lens.stride(),
        *starts.stride(),
        partition,
        least_range,
        HEADS=heads,
        HEAD_DIM=head_dim,
        DIM_PAD=padded_dim(head_dim),
        BLOCK_SIZE=block_size,
        TILE=tile,
        num_warps=4,
    )
    return out
