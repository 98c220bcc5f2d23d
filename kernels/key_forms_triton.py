"""Linear and quadratic forms of paged keys, in Triton. Each key is read once, for all members of its group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.tiles import load_blocks

TILE = 64
"""Keys of a program."""

STRIDES = tuple(
    f"{of}_{by}_stride"
    for of in ("table", "lens", "linear", "sizes", "squares")
    for by in ("layer", "row", "head", "member")
)


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", *STRIDES])
def _key_forms(
    k_ptr,
    table_ptr,
    lens_ptr,
    linear_ptr,
    sizes_ptr,
    squares_ptr,
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
    linear_layer_stride,
    linear_row_stride,
    linear_head_stride,
    linear_member_stride,
    sizes_layer_stride,
    sizes_row_stride,
    sizes_head_stride,
    sizes_member_stride,
    squares_layer_stride,
    squares_row_stride,
    squares_head_stride,
    squares_member_stride,
    squares_kind_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One layer, request, KV head and tile of keys."""
    start = tl.program_id(0) * TILE
    pair = tl.program_id(1)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    layer = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    if start >= length:
        return
    k_head = k_ptr + layer * layer_stride + head * head_stride
    table = table_ptr + layer * table_layer_stride + row * table_row_stride + head * table_head_stride
    blocks = load_blocks(table, start, length, BLOCK_SIZE, TILE)
    inside, dims = tl.arange(0, TILE), tl.arange(0, HALF_PAD)
    held, first, second = start + inside < length, dims < HALF, dims + HALF < HEAD_DIM
    offsets = blocks * block_stride + (start % BLOCK_SIZE + inside) % BLOCK_SIZE * HEAD_DIM
    k_ptrs = k_head + offsets[:, None] + dims[None, :]
    x = tl.load(k_ptrs, mask=held[:, None] & first[None, :], other=0.0).to(tl.float32)
    y = tl.load(k_ptrs + HALF, mask=held[:, None] & (first & second)[None, :], other=0.0).to(tl.float32)
    if sizes_ptr is not None:
        size = tl.sqrt(x * x + y * y)

    linear = linear_ptr + layer * linear_layer_stride + row * linear_row_stride + head * linear_head_stride
    out = out_ptr + (layer * tl.num_programs(1) + pair) * GROUP * width + start + inside
    for member in range(GROUP):
        of_x = tl.load(linear + member * linear_member_stride + dims, mask=first, other=0.0)[None, :]
        of_y = tl.load(linear + member * linear_member_stride + HALF + dims, mask=first & second, other=0.0)[None, :]
        if squares_ptr is None:
            terms = of_x * x + of_y * y
        else:
            squares = squares_ptr + layer * squares_layer_stride + row * squares_row_stride + head * squares_head_stride
            squares += member * squares_member_stride + dims
            xx = tl.load(squares, mask=first, other=0.0)[None, :]
            xy = tl.load(squares + squares_kind_stride, mask=first, other=0.0)[None, :]
            yy = tl.load(squares + 2 * squares_kind_stride, mask=first, other=0.0)[None, :]
            terms = (of_x + xx * x + 2 * xy * y) * x + (of_y + yy * y) * y
        if sizes_ptr is not None:
            sizes = sizes_ptr + layer * sizes_layer_stride + row * sizes_row_stride + head * sizes_head_stride
            terms += tl.load(sizes + member * sizes_member_stride + dims, mask=first, other=0.0)[None, :] * size
        tl.store(out + member * width, tl.sum(terms, 1), mask=held)


def key_forms_triton(
    view: CacheView, linear: Tensor, sizes: Tensor | None = None, squares: Tensor | None = None
) -> Tensor:
    """`kernels.key_forms` on CUDA, or interpreted."""
    layers, requests, heads = view.lens.shape
    group, head_dim = linear.shape[3:]
    out = torch.zeros(layers, requests, heads, group, view.width, device=linear.device)
    if out.numel() == 0:
        return out
    half = (head_dim + 1) // 2
    _key_forms[(triton.cdiv(view.width, TILE), requests * heads, layers)](
        view.k_cache,
        view.block_tables,
        view.lens,
        linear,
        sizes,
        squares,
        out,
        view.width,
        *view.k_cache.stride()[:3],
        *view.block_tables.stride()[:3],
        *view.lens.stride(),
        *linear.stride()[:4],
        *((0,) * 4 if sizes is None else sizes.stride()[:4]),
        *((0,) * 5 if squares is None else squares.stride()[:5]),
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HALF=half,
        HALF_PAD=triton.next_power_of_2(half),
        BLOCK_SIZE=view.k_cache.shape[3],
        TILE=TILE,
        num_warps=4,
    )
    return out
