"""Decode attention shared out evenly over programs, in Triton.

A launch lasts as long as its longest program, and the lengths are on the device alone, where a replayed CUDA graph finds
new ones each time. So the work is shared out there, once a step for all layers: each program gets as many tiles, wherever
lines begin and end, as Stream-K (arXiv 2301.03598) does with the tiles of a matrix product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shares import Shares

CELLS = 8192
"""Programs times requests that one program compares."""


@triton.jit
def _tiles(lens_ptr, lines, inside, row_stride, head_stride, HEADS: tl.constexpr, TILE: tl.constexpr):
    """Of each line; 0 of none."""
    length = tl.load(lens_ptr + lines // HEADS * row_stride + lines % HEADS * head_stride, mask=inside, other=0)
    return tl.where(inside, tl.maximum(tl.cdiv(length, TILE), 1), 0)


@triton.jit(do_not_specialize=["lens_ptr", "lines", "programs", "layer_stride", "head_stride"])
def _share(
    lens_ptr,
    starts_ptr,
    tiles_ptr,
    arrived_ptr,
    lines,
    programs,
    layer_stride,
    row_stride,
    head_stride,
    HEADS: tl.constexpr,
    SAME: tl.constexpr,
    TILE: tl.constexpr,
    LINES_PAD: tl.constexpr,
    EACH: tl.constexpr,
):
    """The starts of EACH programs in a layer. Of `lines` lines, each stands for SAME of equal length."""
    layer = tl.program_id(1)
    lens_ptr += layer * layer_stride
    starts_ptr += layer * 2 * (programs + 1)
    every = tl.arange(0, LINES_PAD)
    counts = _tiles(lens_ptr, every, every < lines, row_stride, head_stride, HEADS, TILE) * SAME
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)

    program = tl.program_id(0) * EACH + tl.arange(0, EACH)
    working = tl.minimum(programs, total)
    begin = (tl.minimum(program, working).to(tl.int64) * total // tl.maximum(working, 1)).to(tl.int32)
    before = ends[None, :] <= begin[:, None]
    line = tl.sum(tl.where(every[None, :] < lines, before.to(tl.int32), 0), 1)
    rest = begin - tl.sum(tl.where(before, counts[None, :], 0), 1)
    mine = tl.maximum(_tiles(lens_ptr, line, line < lines, row_stride, head_stride, HEADS, TILE), 1)
    inside = program <= programs
    tl.store(starts_ptr + program, line * SAME + rest // mine, mask=inside)
    tl.store(starts_ptr + programs + 1 + program, rest % mine, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr + layer, total)
        for same in range(SAME):
            tl.store(arrived_ptr + layer * lines * SAME + every * SAME + same, 0, mask=every < lines)


def share_decodes(lens: Tensor, tile: int, programs: int) -> Shares:
    """Share out the tiles of all lines.

    Args:
        lens: int32 [B, H]. Or [L, B, H]: each layer by itself.
        tile: entries of a tile.
        programs: P.

    Returns:
        Each tensor has the dimension L where `lens` has.
    """
    *layers, batch, kv_heads = lens.shape
    same = 1 if lens.stride(-1) else kv_heads
    lines, heads = batch * kv_heads // same, kv_heads // same
    starts = torch.empty((*layers, 2, programs + 1), dtype=torch.int32, device=lens.device)
    tiles = torch.empty((*layers, 1), dtype=torch.int32, device=lens.device)
    arrived = torch.empty((*layers, batch * kv_heads), dtype=torch.int32, device=lens.device)
    lines_pad = triton.next_power_of_2(max(lines, 2))
    each = max(2, CELLS // lines_pad)
    _share[(triton.cdiv(programs + 1, each), *(layers or [1]))](
        lens, starts, tiles, arrived, lines, programs, *([] if layers else [0]), *lens.stride(),
        HEADS=heads, SAME=same, TILE=tile, LINES_PAD=lines_pad, EACH=each, num_warps=4,
    )  # fmt: skip
    return Shares(starts, tiles, arrived)
