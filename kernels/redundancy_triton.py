"""How much paged keys repeat each other, in Triton: in chunks ("lightning") or over the whole request.

The tile of cosines is never written. A chunk of up to 256 keys is one program's work. In a larger set a key's sum of
cosines is its product with the sum of all directions, and products of pairs only find its last duplicate. What a key is
excused is summed in integers: sums in any order are the same.

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

ROWS = 128
"""Keys whose last duplicates a program finds, in 16 bits: each tile of keys that it reads is worth as many products."""

FIXED = 2**32
"""Units of what a key is excused to a cosine of 1."""

LENS_STRIDES = ("lens_layer_stride", "lens_row_stride", "lens_head_stride")


@triton.jit
def _norms(k):
    """|k| of each column of k [DIM_PAD, n], at least 1e-6: float32 [n]."""
    x = k.to(tl.float32)
    return tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-6)


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
    norms = 1.0 / _norms(k)
    columns = tl.arange(0, CHUNK)
    raw = tl.zeros([CHUNK], tl.float32)
    for first in range(0, CHUNK, ROWS):
        row_blocks = load_blocks(table, start + first, length, BLOCK_SIZE, ROWS)
        k_rows = load_keys(
            k_head, row_blocks, block_stride, start + first, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, ROWS
        )  # fmt: skip
        cosine = _cosines(k_rows, 1.0 / _norms(k_rows), first + tl.arange(0, ROWS), k, norms, columns)
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


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", "sums_ptr", *LENS_STRIDES])
def _norms_and_sums(
    k_ptr,
    table_ptr,
    lens_ptr,
    norms_ptr,
    sums_ptr,
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
    TILE: tl.constexpr,
):
    """One layer, request, KV head and tile of keys: each one's norm, inf past n, and the sum of k / |k|."""
    start = tl.program_id(0) * TILE
    pair = tl.program_id(1)
    row = pair // HEADS
    layer = tl.program_id(2).to(tl.int64)
    head = pair % HEADS
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    k_head = k_ptr + layer * layer_stride + head * head_stride
    table = table_ptr + layer * table_layer_stride + row.to(tl.int64) * table_row_stride + head * table_head_stride
    line = layer * tl.num_programs(1) + pair

    blocks = load_blocks(table, start, length, BLOCK_SIZE, TILE)
    k = load_keys(k_head, blocks, block_stride, start, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE)
    norms = _norms(k)
    keys = start + tl.arange(0, TILE)
    norms_line = norms_ptr + line * tl.num_programs(0) * TILE
    tl.store(norms_line + keys, tl.where(keys < length, norms, float("inf")))
    place = (line * tl.num_programs(0) + tl.program_id(0)) * DIM_PAD + tl.arange(0, DIM_PAD)
    tl.store(sums_ptr + place, tl.sum(k.to(tl.float32) / norms[None, :], 1))


@triton.jit
def _last_in(
    last,
    k_rows,
    bounds,
    start,
    k_head,
    table,
    norms_line,
    block_stride,
    first,
    end,
    length,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ITSELF: tl.constexpr,
):
    """The later of `last` [ROWS] and the last of the keys first .. end - 1 whose product with a row's key is above
    `bounds` times its norm, which is inf past `length`. ITSELF: these keys are the rows, and others in their tile.
    """
    rows = start + tl.arange(0, ROWS)
    inside = tl.arange(0, TILE)
    blocks = load_blocks(table, first, length, BLOCK_SIZE, TILE)
    for tile in range(first, end, TILE):
        next_blocks = load_blocks(table, tile + TILE, length, BLOCK_SIZE, TILE)
        k = load_keys(k_head, blocks, block_stride, tile, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE, MASKED=False)
        norms = tl.load(norms_line + tile + inside)
        products = tl.dot(k_rows, k, input_precision="ieee")
        if ITSELF:
            products = tl.where(rows[:, None] == tile + inside[None, :], float("-inf"), products)
        found = tl.max(tl.where(products > bounds[:, None] * norms[None, :], inside[None, :], -1), 1)
        last = tl.where(found >= 0, tl.maximum(last, tile + found), last)
        blocks = next_blocks
    return last


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", "last_ptr", *LENS_STRIDES])
def _last_duplicates(
    k_ptr,
    table_ptr,
    lens_ptr,
    norms_ptr,
    last_ptr,
    threshold,
    width,
    norms_width,
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
    """One layer, request, KV head and tile of keys: each key's last duplicate, or -1."""
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
    index = layer * tl.num_programs(1) + pair
    norms_line = norms_ptr + index * norms_width

    blocks = load_blocks(table, start, length, BLOCK_SIZE, ROWS)
    k = load_keys(k_head, blocks, block_stride, start, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, ROWS)
    rows = start + tl.arange(0, ROWS)
    held = rows < length
    norms = tl.load(norms_line + rows, mask=held, other=1.0)
    k = tl.trans(k)  # here, or each tile's product would begin with a copy of it
    begin, end = _compared(start, length, CHUNK)
    own = start // TILE * TILE
    last = tl.where(held, -1, length)
    last = _last_in(
        last, k, threshold * norms, start, k_head, table, norms_line, block_stride, own + TILE, end, length,
        HEAD_DIM, DIM_PAD, BLOCK_SIZE, ROWS, TILE, False,
    )  # fmt: skip
    last = _last_in(
        last, k, threshold * norms, start, k_head, table, norms_line, block_stride, own, own + TILE, length,
        HEAD_DIM, DIM_PAD, BLOCK_SIZE, ROWS, TILE, True,
    )  # fmt: skip
    # Where each key has one among these, none before can be its last.
    own = tl.where(tl.min(last, 0) < 0, own, begin)
    last = _last_in(
        last, k, threshold * norms, start, k_head, table, norms_line, block_stride, begin, own, length,
        HEAD_DIM, DIM_PAD, BLOCK_SIZE, ROWS, TILE, False,
    )  # fmt: skip
    tl.store(last_ptr + index * width + rows, last, mask=held)


@triton.jit(
    do_not_specialize=["table_ptr", "lens_ptr", "last_ptr", "sums_ptr", "raw_ptr", "excused_ptr",
                       *LENS_STRIDES]
)  # fmt: skip
def _sums_and_excused(
    k_ptr,
    table_ptr,
    lens_ptr,
    norms_ptr,
    last_ptr,
    sums_ptr,
    raw_ptr,
    excused_ptr,
    width,
    norms_width,
    runs,
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
    FIXED: tl.constexpr,
):
    """One layer, request, KV head and tile of keys: each key's sum of cosines, and its cosine with its last duplicate
    added to what that one is excused, in units of 1 / FIXED.
    """
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
    index = layer * tl.num_programs(1) + pair
    norms_line = norms_ptr + index * norms_width

    blocks = load_blocks(table, start, length, BLOCK_SIZE, ROWS)
    k = load_keys(k_head, blocks, block_stride, start, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, ROWS)
    rows = start + tl.arange(0, ROWS)
    held = rows < length
    norms = tl.load(norms_line + rows, mask=held, other=1.0)
    dims = tl.arange(0, DIM_PAD)
    x = k.to(tl.float32)
    run = start // CHUNK if CHUNK > 0 else 0
    total = tl.load(sums_ptr + (index * runs + run) * DIM_PAD + dims)
    itself = tl.sum(x * x, 0) / (norms * norms)
    tl.store(raw_ptr + index * width + rows, tl.sum(x * total[:, None], 0) / norms - itself, mask=held)

    last = tl.load(last_ptr + index * width + rows, mask=held, other=-1)
    found = last >= 0
    last_blocks = tl.load(table + last // BLOCK_SIZE, mask=found, other=0).to(tl.int64)
    places = last_blocks * block_stride + last % BLOCK_SIZE * HEAD_DIM
    inside = found[None, :] & (dims < HEAD_DIM)[:, None]
    k_last = tl.load(k_head + places[None, :] + dims[:, None], mask=inside, other=0.0)
    cosine = tl.sum(x * k_last.to(tl.float32), 0) / (norms * tl.load(norms_line + last, mask=found, other=1.0))
    tl.atomic_add(excused_ptr + index * width + last, (cosine * FIXED).to(tl.int64), mask=found, sem="relaxed")


@triton.jit
def _logits(raw_line, excused_line, index, length, tau, CHUNK: tl.constexpr, FIXED: tl.constexpr):
    """raw / (tau * keys compared) of keys `index`, once what they are excused is off; -inf from `length` on."""
    held = index < length
    raw = tl.load(raw_line + index, mask=held, other=float("-inf"))
    if excused_line is None:
        return raw
    else:
        begin, end = _compared(index, length, CHUNK)
        raw -= tl.load(excused_line + index, mask=held, other=0).to(tl.float32) / FIXED
        return raw / (tau * tl.where(held, end - begin, 1).to(tl.float32))


@triton.jit(do_not_specialize=["lens_ptr", "excused_ptr", *LENS_STRIDES])
def _softmax_rows(
    x_ptr,
    excused_ptr,
    lens_ptr,
    tau,
    width,
    lens_layer_stride,
    lens_row_stride,
    lens_head_stride,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    FIXED: tl.constexpr,
):
    """One layer, request and KV head: the softmax of its first n logits, in place, and -inf in the others."""
    pair = tl.program_id(0)
    row = pair // HEADS
    head = pair % HEADS
    layer = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    place = (layer * tl.num_programs(0) + pair) * width
    line = x_ptr + place
    excused_line = None if excused_ptr is None else excused_ptr + place
    highest = float("-inf")
    total = 0.0
    for start in range(0, length, TILE):
        x = _logits(line, excused_line, start + tl.arange(0, TILE), length, tau, CHUNK, FIXED)
        new = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(x - new), 0)
        highest = new
    for start in range(0, width, TILE):
        index = start + tl.arange(0, TILE)
        x = _logits(line, excused_line, index, length, tau, CHUNK, FIXED)
        value = tl.where(index < length, tl.exp(x - highest) / total, float("-inf"))
        tl.store(line + index, value, mask=index < width)


def redundancy_triton(
    view: CacheView, *, tau: float, threshold: float = 0.5, chunk: int | None = None, fused: bool = True
) -> Tensor:
    """`redundancy` in two launches for chunks that a program holds, in four and a sum for larger sets.

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
    excused = None
    if fused and chunk and chunk <= MAX_CHUNK and chunk * dim_pad * k_cache.element_size() <= most:
        _chunk_sums[(triton.cdiv(width, chunk), pairs, layers)](
            k_cache, block_tables, lens, out, tau, threshold, width, *strides,
            **shape, CHUNK=chunk, ROWS=min(chunk, 16 if wide else 64), num_warps=8 if chunk > 64 else 4, num_stages=2,
        )  # fmt: skip
    else:
        runs = triton.cdiv(width, chunk) if chunk else 1
        rows = min(chunk or ROWS, 16 if wide else 64 if dim_pad > 128 else ROWS)
        tile = min(chunk or 128, 32 if wide else 64 if dim_pad > 128 else 128)
        tiles = runs * (chunk // tile) if chunk else triton.cdiv(width, tile)
        norms = torch.empty((layers, pairs, tiles * tile), dtype=torch.float32, device=out.device)
        sums = torch.empty((layers, pairs, tiles, dim_pad), dtype=torch.float32, device=out.device)
        last = torch.empty(out.shape, dtype=torch.int32, device=out.device)
        excused = torch.zeros(out.shape, dtype=torch.int64, device=out.device)
        keys, shape["CHUNK"] = (k_cache, block_tables, lens, norms), chunk or 0
        _norms_and_sums[(tiles, pairs, layers)](*keys, sums, *strides, **shape, TILE=tile, num_warps=4)
        sums = sums.unflatten(2, (runs, -1)).sum(dim=3)
        _last_duplicates[(triton.cdiv(width, rows), pairs, layers)](
            *keys, last, threshold, width, tiles * tile, *strides,
            **shape, ROWS=rows, TILE=tile, num_stages=2,
            # Two programs a multiprocessor: one looks through products while the other makes some.
            **({"num_warps": 8, "maxnreg": 128} if rows > 64 else {"num_warps": 4}),
        )  # fmt: skip
        _sums_and_excused[(triton.cdiv(width, tile), pairs, layers)](
            *keys, last, sums, out, excused, width, tiles * tile, runs, *strides,
            **shape, ROWS=tile, FIXED=FIXED, num_warps=4,
        )  # fmt: skip
    _softmax_rows[(pairs, layers)](
        out,
        excused,
        lens,
        tau,
        width,
        *lens.stride(),
        HEADS=kv_heads,
        CHUNK=chunk or 0,
        TILE=min(SOFTMAX_TILE, triton.next_power_of_2(width)),
        FIXED=FIXED,
        num_warps=8,
    )
    return out
