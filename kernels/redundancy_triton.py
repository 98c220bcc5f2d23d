"""How much paged keys repeat each other, in Triton: in chunks ("lightning") or over the whole request.

The tile of cosines is never written. A chunk of up to 256 keys is one program's work. A larger set takes two launches:
rows find their sum, their last duplicate and its cosine; columns then take off what they excuse.

Sources: R-KV (arXiv 2505.24133), Zipage (arXiv 2603.08743), G-KV (arXiv 2512.00504).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.tiles import load_blocks, load_keys, padded_dim

CHUNK_BYTES = 64 * 1024
"""Largest chunk of keys that one program holds; half of it in float32, without tensor cores."""

MAX_CHUNK = 256
SOFTMAX_TILE = 4096

LENS_STRIDES = ("lens_layer_stride", "lens_row_stride", "lens_head_stride")


@triton.jit
def _inverse_norms(k):
    """1 / |k| of each column of k [DIM_PAD, n], the norm at least 1e-6: float32 [n]."""
    x = k.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-6)


@triton.jit
def _cosines(k_rows, norms_rows, rows, k_columns, norms_columns, columns):
    """Cosines of keys `rows` with keys `columns`, 0 of a key with itself: float32 [rows, columns]."""
    products = tl.dot(tl.trans(k_rows), k_columns, input_precision="ieee")
    products = products * norms_rows[:, None] * norms_columns[None, :]
    return tl.where(rows[:, None] == columns[None, :], 0.0, products)


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", *LENS_STRIDES])
def _chunk_sums(
    k_ptr,
    table_ptr,
    lens_ptr,
    out_ptr,
    tau,
    threshold,
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
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One layer, request, KV head and chunk: raw / (tau * keys of the chunk)."""
    start = tl.program_id(0) * CHUNK
    pair = tl.program_id(1)
    row = pair // HEADS
    layer = tl.program_id(2).to(tl.int64)
    head = pair % HEADS
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    if start >= length:
        return
    k_head = k_ptr + layer * layer_stride + head * head_stride
    table = table_ptr + layer * table_layer_stride + row.to(tl.int64) * table_row_stride + head * table_head_stride

    blocks = load_blocks(table, start, length, BLOCK_SIZE, CHUNK)
    k = load_keys(k_head, blocks, block_stride, start, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, CHUNK)
    norms = _inverse_norms(k)
    columns = tl.arange(0, CHUNK)
    raw = tl.zeros([CHUNK], tl.float32)
    for first in range(0, CHUNK, ROWS):
        row_blocks = load_blocks(table, start + first, length, BLOCK_SIZE, ROWS)
        k_rows = load_keys(
            k_head, row_blocks, block_stride, start + first, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, ROWS
        )  # fmt: skip
        cosine = _cosines(k_rows, _inverse_norms(k_rows), first + tl.arange(0, ROWS), k, norms, columns)
        last = tl.max(tl.where(cosine > threshold, columns[None, :], -1), 1)
        raw += tl.sum(tl.where(columns[None, :] == last[:, None], 0.0, cosine), 0)
    entries = start + columns
    compared = tl.minimum(length - start, CHUNK).to(tl.float32)
    out_row = out_ptr + (layer * tl.num_programs(1) + pair) * width
    tl.store(out_row + entries, raw / (tau * compared), mask=entries < length)


@triton.jit
def _compared(start, length, CHUNK: tl.constexpr):
    """First slot, and slot past the last, of the keys that slot `start` is compared with; CHUNK 0: all."""
    if CHUNK > 0:
        first = start // CHUNK * CHUNK
        return first, tl.minimum(first + CHUNK, length)
    else:
        return start * 0, length


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", "sum_ptr", "last_ptr", "excused_ptr", *LENS_STRIDES])
def _row_sums(
    k_ptr,
    table_ptr,
    lens_ptr,
    sum_ptr,
    last_ptr,
    excused_ptr,
    threshold,
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
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One layer, request, KV head and tile of keys: each key's sum of cosines, last duplicate (or -1), its cosine."""
    start = tl.program_id(0) * ROWS
    pair = tl.program_id(1)
    row = pair // HEADS
    layer = tl.program_id(2).to(tl.int64)
    head = pair % HEADS
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    if start >= length:
        return
    k_head = k_ptr + layer * layer_stride + head * head_stride
    table = table_ptr + layer * table_layer_stride + row.to(tl.int64) * table_row_stride + head * table_head_stride

    row_blocks = load_blocks(table, start, length, BLOCK_SIZE, ROWS)
    k_rows = load_keys(k_head, row_blocks, block_stride, start, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, ROWS)
    norms_rows = _inverse_norms(k_rows)
    rows = start + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    last = tl.full([ROWS], -1, tl.int32)
    excused = tl.zeros([ROWS], tl.float32)
    begin, end = _compared(start, length, CHUNK)
    blocks = load_blocks(table, begin, length, BLOCK_SIZE, TILE)
    for first in range(begin, end, TILE):
        next_blocks = load_blocks(table, first + TILE, length, BLOCK_SIZE, TILE)
        k = load_keys(k_head, blocks, block_stride, first, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE)
        columns = first + tl.arange(0, TILE)
        cosine = _cosines(k_rows, norms_rows, rows, k, _inverse_norms(k), columns)
        total += tl.sum(cosine, 1)
        found = tl.max(tl.where(cosine > threshold, columns[None, :], -1), 1)
        value = tl.sum(tl.where(columns[None, :] == found[:, None], cosine, 0.0), 1)
        excused = tl.where(found >= 0, value, excused)
        last = tl.maximum(last, found)
        blocks = next_blocks
    place = (layer * tl.num_programs(1) + pair) * width + rows
    held = rows < length
    tl.store(sum_ptr + place, total, mask=held)
    tl.store(last_ptr + place, last, mask=held)
    tl.store(excused_ptr + place, excused, mask=held)


@triton.jit(do_not_specialize=["lens_ptr", "last_ptr", "excused_ptr", *LENS_STRIDES])
def _take_off_excused(
    sum_ptr,
    last_ptr,
    excused_ptr,
    lens_ptr,
    tau,
    width,
    lens_layer_stride,
    lens_row_stride,
    lens_head_stride,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One layer, request, KV head and tile of keys: raw / (tau * keys compared), in the sums' place."""
    start = tl.program_id(0) * ROWS
    pair = tl.program_id(1)
    row = pair // HEADS
    head = pair % HEADS
    layer = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    if start >= length:
        return
    base = (layer * tl.num_programs(1) + pair) * width
    rows = start + tl.arange(0, ROWS)
    raw = tl.load(sum_ptr + base + rows, mask=rows < length, other=0.0)
    begin, end = _compared(start, length, CHUNK)
    for first in range(begin, end, TILE):
        others = first + tl.arange(0, TILE)
        last = tl.load(last_ptr + base + others, mask=others < end, other=-1)
        excused = tl.load(excused_ptr + base + others, mask=others < end, other=0.0)
        raw -= tl.sum(tl.where(rows[:, None] == last[None, :], excused[None, :], 0.0), 1)
    tl.store(sum_ptr + base + rows, raw / (tau * (end - begin).to(tl.float32)), mask=rows < length)


@triton.jit(do_not_specialize=["lens_ptr", *LENS_STRIDES])
def _softmax_rows(
    x_ptr,
    lens_ptr,
    width,
    lens_layer_stride,
    lens_row_stride,
    lens_head_stride,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One layer, request and KV head: the softmax of its first n numbers, in place, and -inf in the others."""
    pair = tl.program_id(0)
    row = pair // HEADS
    head = pair % HEADS
    layer = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    line = x_ptr + (layer * tl.num_programs(0) + pair) * width
    highest = float("-inf")
    total = 0.0
    for start in range(0, length, TILE):
        index = start + tl.arange(0, TILE)
        x = tl.load(line + index, mask=index < length, other=float("-inf"))
        new = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(x - new), 0)
        highest = new
    for start in range(0, width, TILE):
        index = start + tl.arange(0, TILE)
        x = tl.load(line + index, mask=index < length, other=0.0)
        value = tl.where(index < length, tl.exp(x - highest) / total, float("-inf"))
        tl.store(line + index, value, mask=index < width)


def redundancy_triton(
    view: CacheView, *, tau: float, threshold: float = 0.5, chunk: int | None = None, fused: bool = True
) -> Tensor:
    """`redundancy` in two launches for chunks that a program holds, in three for larger sets.

    Args:
        fused: False takes the way of larger sets for every chunk. The others as in `redundancy`.
    """
    k_cache, _, block_tables, lens = view
    layers, _, kv_heads, block_size, head_dim = k_cache.shape
    requests, width = lens.shape[1], view.width
    out = torch.empty((layers, requests, kv_heads, width), dtype=torch.float32, device=k_cache.device)
    if out.numel() == 0:
        return out
    pairs, dim_pad = requests * kv_heads, padded_dim(head_dim)
    strides = *k_cache.stride()[:3], *block_tables.stride()[:3], *lens.stride()
    shape = {"HEADS": kv_heads, "HEAD_DIM": head_dim, "DIM_PAD": dim_pad, "BLOCK_SIZE": block_size}
    wide = k_cache.element_size() == 4
    most = CHUNK_BYTES // (2 if wide else 1)
    if fused and chunk and chunk <= MAX_CHUNK and chunk * dim_pad * k_cache.element_size() <= most:
        _chunk_sums[(triton.cdiv(width, chunk), pairs, layers)](
            k_cache, block_tables, lens, out, tau, threshold, width, *strides,
            **shape, CHUNK=chunk, ROWS=min(chunk, 16 if wide else 64), num_warps=8 if chunk > 64 else 4, num_stages=2,
        )  # fmt: skip
    else:
        rows = min(chunk or 64, 16 if wide else 64)
        tile = min(chunk or 128, 32 if wide else 64 if dim_pad > 128 else 128)
        last = torch.empty(out.shape, dtype=torch.int32, device=out.device)
        excused = torch.empty_like(out)
        grid = triton.cdiv(width, rows), pairs, layers
        _row_sums[grid](
            k_cache, block_tables, lens, out, last, excused, threshold, width, *strides,
            **shape, CHUNK=chunk or 0, ROWS=rows, TILE=tile, num_warps=4, num_stages=2,
        )  # fmt: skip
        _take_off_excused[grid](
            out, last, excused, lens, tau, width, *lens.stride(),
            HEADS=kv_heads, CHUNK=chunk or 0, ROWS=rows, TILE=tile, num_warps=4,
        )  # fmt: skip
    _softmax_rows[(pairs, layers)](
        out,
        lens,
        width,
        *lens.stride(),
        HEADS=kv_heads,
        TILE=min(SOFTMAX_TILE, triton.next_power_of_2(width)),
        num_warps=8,
    )
    return out
