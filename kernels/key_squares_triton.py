"""Linear and quadratic forms of paged keys under whole matrices, in Triton.

A program turns its matrix and not its keys: K^T (R^T M R) K. The turned matrix stays in shared memory while keys pass
by. Halves (x, y) of a key give `x.(xx x + cross y) + y.(yy y)`: three products of half-blocks where four would be. A
matrix is a sum of two in bfloat16, and so is a key of another type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.tiles import load_blocks

MOST_KEYS = 4096
"""Of a program, which turns its matrix once."""

STRIDES = (
    *(f"{of}_{by}_stride" for of in ("table", "lens") for by in ("layer", "row", "head")),
    *(f"{of}_{by}_stride" for of in ("linear", "matrix") for by in ("layer", "row", "head", "member")),
)


@triton.jit
def _parts(x, PART: tl.constexpr):
    """x, float32, as a sum of two: in bfloat16, and the rest."""
    high = x.to(tl.bfloat16).to(tl.float32)
    return high.to(PART), (x - high).to(PART)


@triton.jit
def _product(keys, high, low, acc, EXACT: tl.constexpr, PART: tl.constexpr):
    """acc + keys @ (high + low). EXACT: keys are numbers of bfloat16."""
    keys_high, keys_low = _parts(keys, PART)
    if not EXACT:
        acc = tl.dot(keys_low, low, acc, input_precision="ieee")
        acc = tl.dot(keys_low, high, acc, input_precision="ieee")
    acc = tl.dot(keys_high, low, acc, input_precision="ieee")
    return tl.dot(keys_high, high, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", "linear_ptr", *STRIDES])
def _key_squares(
    k_ptr,
    table_ptr,
    lens_ptr,
    linear_ptr,
    matrix_ptr,
    turn_ptr,
    out_ptr,
    width,
    most_keys,
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
    EXACT: tl.constexpr,
    PART: tl.constexpr,
):
    """One layer, request, KV head and member of its group, and up to `most_keys` keys."""
    member = tl.program_id(0) % GROUP
    start = tl.program_id(0) // GROUP * most_keys
    pair = tl.program_id(1)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    layer = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    if start >= length:
        return
    dims = tl.arange(0, HALF_PAD)
    first = dims < HALF
    square = first[:, None] & first[None, :]
    matrix = matrix_ptr + layer * matrix_layer_stride + row * matrix_row_stride + head * matrix_head_stride
    matrix += member * matrix_member_stride + dims[:, None] * (2 * HALF) + dims[None, :]
    a, b = tl.load(matrix, mask=square, other=0.0), tl.load(matrix + HALF, mask=square, other=0.0)
    matrix += 2 * HALF * HALF
    c, d = tl.load(matrix, mask=square, other=0.0), tl.load(matrix + HALF, mask=square, other=0.0)
    turn = turn_ptr + row * turn_row_stride + dims
    cos, sin = tl.load(turn, mask=first, other=0.0), tl.load(turn + turn_kind_stride, mask=first, other=0.0)
    # Of M = ((a, b), (c, d)): M R, then R^T (M R).
    upper, lower = a * cos[None, :] + b * sin[None, :], c * cos[None, :] + d * sin[None, :]
    xx_high, xx_low = _parts(cos[:, None] * upper + sin[:, None] * lower, PART)
    cross = cos[:, None] * lower - sin[:, None] * upper
    upper, lower = b * cos[None, :] - a * sin[None, :], d * cos[None, :] - c * sin[None, :]
    cross += tl.trans(cos[:, None] * upper + sin[:, None] * lower)
    cross_high, cross_low = _parts(cross, PART)
    yy_high, yy_low = _parts(cos[:, None] * lower - sin[:, None] * upper, PART)

    linear = linear_ptr + layer * linear_layer_stride + row * linear_row_stride + head * linear_head_stride
    linear += member * linear_member_stride + dims
    linear_x = tl.load(linear, mask=first, other=0.0)[None, :]
    linear_y = tl.load(linear + HALF, mask=first, other=0.0)[None, :]
    table = table_ptr + layer * table_layer_stride + row * table_row_stride + head * table_head_stride
    keys = k_ptr + layer * layer_stride + head * head_stride + dims[None, :]
    inside = tl.arange(0, TILE)
    out = out_ptr + ((layer * tl.num_programs(1) + pair) * GROUP + member) * width + inside
    blocks = load_blocks(table, start, length, BLOCK_SIZE, TILE)
    for begin in range(start, min(start + most_keys, length), TILE):
        offsets = blocks * block_stride + (begin % BLOCK_SIZE + inside) % BLOCK_SIZE * (2 * HALF)
        # Slots past the length may hold NaN, which reaches no other key. Negative keys have the same squares; what is
        # computed is multiplied from registers, and what is loaded from shared memory, which is busy.
        x = tl.load(keys + offsets[:, None], mask=first[None, :], other=0.0).to(tl.float32) * -1.0
        y = tl.load(keys + offsets[:, None] + HALF, mask=first[None, :], other=0.0).to(tl.float32) * -1.0
        blocks = load_blocks(table, begin + TILE, length, BLOCK_SIZE, TILE)
        of_x = _product(x, xx_high, xx_low, tl.zeros([TILE, HALF_PAD], tl.float32), EXACT, PART)
        of_x = _product(y, cross_high, cross_low, of_x, EXACT, PART)
        forms = tl.sum((of_x - linear_x) * x, 1)
        of_y = _product(y, yy_high, yy_low, tl.zeros([TILE, HALF_PAD], tl.float32), EXACT, PART)
        forms += tl.sum((of_y - linear_y) * y, 1)
        tl.store(out + begin, forms, mask=begin + inside < length)


def square_tiles(element_size: int) -> dict[str, int]:
    """Keys of a product, and Triton's launch options.

    Two tiles of keys are on their way beside the matrix in 99 KB, which desktop GPUs have; of float32 one.
    """
    return {"TILE": 64, "num_warps": 4, "num_stages": 2 if element_size == 4 else 3}


def key_squares_triton(view: CacheView, linear: Tensor, matrices: Tensor, turn: Tensor) -> Tensor:
    """`kernels.key_squares` on CUDA, or interpreted."""
    layers, requests, heads = view.lens.shape
    group, head_dim = matrices.shape[3:5]
    out = torch.zeros(layers, requests, heads, group, view.width, device=matrices.device)
    if out.numel() == 0:
        return out
    half = head_dim // 2
    tiles = square_tiles(view.k_cache.element_size())
    programs = triton.cdiv(view.width, MOST_KEYS)
    most_keys = triton.cdiv(view.width, programs * tiles["TILE"]) * tiles["TILE"]
    _key_squares[(programs * group, requests * heads, layers)](
        view.k_cache,
        view.block_tables,
        view.lens,
        linear,
        matrices,
        turn,
        out,
        view.width,
        most_keys,
        *view.k_cache.stride()[:3],
        *view.block_tables.stride()[:3],
        *view.lens.stride(),
        *linear.stride()[:4],
        *matrices.stride()[:4],
        *turn.stride()[:2],
        HEADS=heads,
        GROUP=group,
        HALF=half,
        HALF_PAD=max(16, triton.next_power_of_2(half)),
        BLOCK_SIZE=view.k_cache.shape[3],
        EXACT=view.k_cache.dtype == torch.bfloat16,
        # Triton's interpreter gets products of bfloat16 wrong.
        PART=tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
        **tiles,
    )
    return out
