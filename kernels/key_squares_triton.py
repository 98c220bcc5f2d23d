"""Quadratic forms of paged keys, in Triton. Each key is read and turned once, for all members of its group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.tiles import load_blocks

TILE = 128
"""Keys of a program, whose products with a matrix stay in registers for heads of up to `key_squares.MOST_DIM`."""

STRIDES = (
    *(f"{of}_{by}_stride" for of in ("table", "lens", "matrix") for by in ("layer", "row", "head")),
    "matrix_member_stride",
)


@triton.jit
def _product(a, b_ptrs, mask, PRECISION: tl.constexpr):
    return tl.dot(a, tl.load(b_ptrs, mask=mask, other=0.0), input_precision=PRECISION)


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", *STRIDES])
def _key_squares(
    k_ptr,
    table_ptr,
    lens_ptr,
    matrix_ptr,
    turn_ptr,
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
    matrix_layer_stride,
    matrix_row_stride,
    matrix_head_stride,
    matrix_member_stride,
    turn_row_stride,
    turn_kind_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One layer, request, KV head and tile of keys."""
    start = tl.program_id(0) * TILE
    pair = tl.program_id(1)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    layer = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    if start >= length:
        return
    table = table_ptr + layer * table_layer_stride + row * table_row_stride + head * table_head_stride
    blocks = load_blocks(table, start, length, BLOCK_SIZE, TILE)
    inside, dims = tl.arange(0, TILE), tl.arange(0, HALF_PAD)
    held, first = start + inside < length, dims < HALF
    offsets = blocks * block_stride + (start % BLOCK_SIZE + inside) % BLOCK_SIZE * (2 * HALF)
    k_ptrs = k_ptr + layer * layer_stride + head * head_stride + offsets[:, None] + dims[None, :]
    mask = held[:, None] & first[None, :]
    key_x = tl.load(k_ptrs, mask=mask, other=0.0).to(tl.float32)
    key_y = tl.load(k_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    turn = turn_ptr + row * turn_row_stride + dims
    cos = tl.load(turn, mask=first, other=0.0)[None, :]
    sin = tl.load(turn + turn_kind_stride, mask=first, other=0.0)[None, :]
    x, y = key_x * cos - key_y * sin, key_x * sin + key_y * cos

    square = first[:, None] & first[None, :]
    matrix = matrix_ptr + layer * matrix_layer_stride + row * matrix_row_stride + head * matrix_head_stride
    matrix_ptrs = matrix + dims[:, None] * (2 * HALF) + dims[None, :]
    out = out_ptr + (layer * tl.num_programs(1) + pair) * GROUP * width + start + inside
    below = 2 * HALF * HALF
    for member in range(GROUP):
        of_x = _product(x, matrix_ptrs, square, PRECISION) + _product(y, matrix_ptrs + below, square, PRECISION)
        terms = of_x * x
        matrix_y = matrix_ptrs + HALF
        of_y = _product(x, matrix_y, square, PRECISION) + _product(y, matrix_y + below, square, PRECISION)
        tl.store(out + member * width, tl.sum(terms + of_y * y, 1), mask=held)
        matrix_ptrs += matrix_member_stride


def key_squares_triton(view: CacheView, matrices: Tensor, turn: Tensor) -> Tensor:
    """`kernels.key_squares` on CUDA, or interpreted. On CUDA each factor is a sum of two bfloat16."""
    layers, requests, heads = view.lens.shape
    group, head_dim = matrices.shape[3:5]
    out = torch.zeros(layers, requests, heads, group, view.width, device=matrices.device)
    if out.numel() == 0:
        return out
    half = head_dim // 2
    _key_squares[(triton.cdiv(view.width, TILE), requests * heads, layers)](
        view.k_cache,
        view.block_tables,
        view.lens,
        matrices,
        turn,
        out,
        view.width,
        *view.k_cache.stride()[:3],
        *view.block_tables.stride()[:3],
        *view.lens.stride(),
        *matrices.stride()[:4],
        *turn.stride()[:2],
        HEADS=heads,
        GROUP=group,
        HALF=half,
        HALF_PAD=max(16, triton.next_power_of_2(half)),
        BLOCK_SIZE=view.k_cache.shape[3],
        TILE=TILE,
        PRECISION="ieee" if triton.knobs.runtime.interpret else "bf16x3",
        num_warps=8,
        num_stages=1,
    )
    return out
