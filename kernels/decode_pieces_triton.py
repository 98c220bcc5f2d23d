"""Decode requests cut into pieces of about the same length, in Triton.

A launch lasts as long as its longest program, and the lengths are on the device alone, where a replayed CUDA graph
finds new ones each time. So they are cut there, once a step for all layers, as Flash-Decoding
(https://pytorch.org/blog/flash-decoding/) cuts one long request.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.pieces import Pieces
from kernels.tiles import decode_tile, multiprocessors

FEW_REQUESTS = 32

PROGRAMS_PER_SM = 2, 6
"""Programs of decode attention aimed at, of few requests and of more, by measurement (docs/log.md). With fewer, the
last ones run alone for longer; with more of few requests, combining pieces takes longer than that."""

MIN_PIECE = 128
"""Entries below which a cut costs more than it hides."""

CELLS = 8192
"""Pieces times requests that one program compares."""


@triton.jit
def _longest(lens_ptr, rows, inside, row_stride, head_stride, LENGTHS: tl.constexpr):
    """The largest of each request's LENGTHS lengths, 0 of no request."""
    longest = tl.load(lens_ptr + rows * row_stride, mask=inside, other=0)
    for head in range(1, LENGTHS):
        longest = tl.maximum(longest, tl.load(lens_ptr + rows * row_stride + head * head_stride, mask=inside, other=0))
    return longest


@triton.jit(do_not_specialize=["lens_ptr", "batch", "num_pieces", "wanted", "layer_stride", "head_stride"])
def _cut(
    lens_ptr,
    ranges_ptr,
    starts_ptr,
    arrived_ptr,
    batch,
    num_pieces,
    wanted,
    layer_stride,
    row_stride,
    head_stride,
    KV_HEADS: tl.constexpr,
    LENGTHS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    PIECES: tl.constexpr,
):
    """PIECES pieces of a layer. Every program counts those of all requests anew."""
    layer = tl.program_id(1)
    lens_ptr += layer * layer_stride
    ranges_ptr += layer * 3 * num_pieces
    starts_ptr += layer * (batch + 1)
    arrived_ptr += layer * batch * KV_HEADS
    rows = tl.arange(0, BATCH_PAD)
    tiles = tl.cdiv(_longest(lens_ptr, rows, rows < batch, row_stride, head_stride, LENGTHS), TILE)
    most = tl.maximum(tl.cdiv(tl.sum(tiles, 0), wanted), MIN_TILES)
    each = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, most), 1))
    counts = tl.where(rows < batch, tl.maximum(tl.cdiv(tiles, tl.maximum(each, 1)), 1), 0)
    ends = tl.cumsum(counts, 0)

    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    before = ends[None, :] <= piece[:, None]
    row = tl.sum(before.to(tl.int32), 1)
    held = row < batch
    mine = tl.cdiv(_longest(lens_ptr, row, held, row_stride, head_stride, LENGTHS), TILE)
    size = tl.cdiv(mine, tl.maximum(tl.cdiv(mine, most), 1))
    first = (piece - tl.sum(tl.where(before, counts[None, :], 0), 1)) * size
    inside = piece < num_pieces
    tl.store(ranges_ptr + piece, tl.where(held, row, -1), mask=inside)
    tl.store(ranges_ptr + num_pieces + piece, first, mask=inside)
    tl.store(ranges_ptr + 2 * num_pieces + piece, tl.minimum(first + size, mine), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(starts_ptr + rows + 1, ends, mask=rows < batch)
        tl.store(starts_ptr, 0)
        for head in range(KV_HEADS):
            tl.store(arrived_ptr + rows * KV_HEADS + head, 0, mask=rows < batch)


def cut_requests(lens: Tensor, bound: int, tile: int, wanted: int | None = None) -> Pieces:
    """Cut requests into pieces of whole tiles, those of one request of about the same length.

    Args:
        lens: int32 [B, H]; a request is cut as its longest head is. Or [L, B, H]: each layer by itself.
        bound: entries that no request exceeds.
        tile: entries of a tile.
        wanted: pieces aimed at, of all requests. None: as many as fill the GPU, or fill it a few times over.

    Returns:
        At most `wanted` pieces and one more for each request; none is shorter than MIN_PIECE unless its request is.
        Each tensor has the dimension L where `lens` has.
    """
    *layers, batch, kv_heads = lens.shape
    if wanted is None:
        programs = PROGRAMS_PER_SM[batch > FEW_REQUESTS] * multiprocessors(lens.device)
        wanted = max(1, programs // kv_heads)
    min_tiles = max(1, MIN_PIECE // tile)
    num_pieces = min(wanted + batch, batch * max(1, triton.cdiv(triton.cdiv(bound, tile), min_tiles)))
    ranges = torch.empty((*layers, 3, num_pieces), dtype=torch.int32, device=lens.device)
    starts = torch.empty((*layers, batch + 1), dtype=torch.int32, device=lens.device)
    arrived = torch.empty((*layers, batch, kv_heads), dtype=torch.int32, device=lens.device)
    batch_pad = triton.next_power_of_2(max(batch, 2))
    each = max(2, CELLS // batch_pad)
    _cut[(max(1, triton.cdiv(num_pieces, each)), *(layers or [1]))](
        lens, ranges, starts, arrived, batch, num_pieces, wanted, *([] if layers else [0]), *lens.stride(),
        KV_HEADS=kv_heads, LENGTHS=kv_heads if lens.stride(-1) else 1,
        TILE=tile, MIN_TILES=min_tiles, BATCH_PAD=batch_pad, PIECES=each, num_warps=4,
    )  # fmt: skip
    return Pieces(ranges, starts, arrived)


def decode_pieces_triton(view: CacheView, wanted: int | None = None) -> Pieces:
    """`decode_pieces` in one launch; `wanted` as in `cut_requests`."""
    tile = decode_tile(view.k_cache.shape[-1], view.k_cache.element_size())["TILE"]
    return cut_requests(view.lens, view.width, tile, wanted)
