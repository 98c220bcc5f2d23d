"""Decode attention shared out evenly over programs, in Triton.

A launch lasts as long as its longest program, and the lengths are on the device alone, where a replayed CUDA graph
finds new ones each time. So the work is shared out there, once a step for all layers: wherever lines begin and end,
each program gets as much, as Stream-K (arXiv 2301.03598) does with the tiles of a matrix product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cache_view import CacheView
from kernels.shares import Shares

CELLS = 8192
"""Programs times lines that one program compares."""


@triton.jit
def _cost(
    lens_ptr, lines, inside, row_stride, head_stride, HEADS: tl.constexpr, TILE: tl.constexpr, LINE_COST: tl.constexpr
):
    """Units of each line; 0 of none."""
    length = tl.load(lens_ptr + lines // HEADS * row_stride + lines % HEADS * head_stride, mask=inside, other=0)
    return tl.where(inside, tl.maximum(tl.cdiv(length, TILE), 1) + LINE_COST, 0)


@triton.jit(do_not_specialize=["lens_ptr", "table_ptr", "lines", "programs", "layer_stride", "head_stride"])
def _share(
    lens_ptr,
    table_ptr,
    starts_ptr,
    units_ptr,
    arrived_ptr,
    fresh_ptr,
    lines,
    programs,
    layer_stride,
    row_stride,
    head_stride,
    table_row_stride,
    table_head_stride,
    HEADS: tl.constexpr,
    SAME: tl.constexpr,
    TILE: tl.constexpr,
    LINE_COST: tl.constexpr,
    LINES_PAD: tl.constexpr,
    EACH: tl.constexpr,
):
    """The starts of EACH programs in a layer. Each of `lines` lines stands for SAME of equal length."""
    layer = tl.program_id(1)
    lens_ptr += layer * layer_stride
    starts_ptr += layer * 2 * (programs + 1)
    every = tl.arange(0, LINES_PAD)
    known = every < lines
    costs = _cost(lens_ptr, every, known, row_stride, head_stride, HEADS, TILE, LINE_COST) * SAME
    ends = tl.cumsum(costs, 0)
    units = tl.sum(costs, 0)

    program = tl.program_id(0) * EACH + tl.arange(0, EACH)
    working = tl.minimum(programs, units)
    begin = (tl.minimum(program, working).to(tl.int64) * units // tl.maximum(working, 1)).to(tl.int32)
    before = (ends[None, :] <= begin[:, None]) & known[None, :]
    line = tl.sum(before.to(tl.int32), 1)
    rest = begin - tl.sum(tl.where(before, costs[None, :], 0), 1)
    mine = tl.maximum(_cost(lens_ptr, line, line < lines, row_stride, head_stride, HEADS, TILE, LINE_COST), 1)
    inside = program <= programs
    tl.store(starts_ptr + program, line * SAME + rest // mine, mask=inside)
    tl.store(starts_ptr + programs + 1 + program, rest % mine, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(units_ptr + layer, units)
        for same in range(SAME):
            tl.store(arrived_ptr + (layer * lines + every) * SAME + same, 0, mask=known)
        fresh = 1
        if table_ptr is not None:
            # Tokens of a prompt follow each other, in the same blocks, each with one entry more.
            row, head = every // HEADS, every % HEADS
            lens_ptrs = lens_ptr + row * row_stride + head * head_stride
            tables = table_ptr + row.to(tl.int64) * table_row_stride + head * table_head_stride
            follows = known & (row > 0)
            length = tl.load(lens_ptrs, mask=follows, other=0)
            longer = length == tl.load(lens_ptrs - row_stride, mask=follows, other=0) + 1
            follows &= longer & (length > 1)
            block = tl.load(tables, mask=follows, other=-1)
            follows &= block == tl.load(tables - table_row_stride, mask=follows, other=-1)
            fresh = tl.max(follows.to(tl.int32), 0)
        tl.store(fresh_ptr + layer, fresh)


def share_decodes(view: CacheView, tile: int, line_cost: int, programs: int) -> Shares:
    """Share out all lines.

    Args:
        view: of one layer. Or its lengths are of all, each shared out by itself; no table is read then.
        tile, line_cost: of `Shares`, in entries and in units.
        programs: P.

    Returns:
        Each tensor has the dimension L where the lengths have.
    """
    lens, tables = view.lens, view.block_tables
    *layers, batch, kv_heads = lens.shape
    same = kv_heads if not view.heads_differ else 1
    lines, heads = batch * kv_heads // same, kv_heads // same
    starts = torch.empty((*layers, 2, programs + 1), dtype=torch.int32, device=lens.device)
    units, fresh = (torch.empty((*layers, 1), dtype=torch.int32, device=lens.device) for _ in range(2))
    arrived = torch.empty((*layers, batch * kv_heads), dtype=torch.int32, device=lens.device)
    lines_pad = triton.next_power_of_2(max(lines, 2))
    each = max(2, CELLS // lines_pad)
    _share[(triton.cdiv(programs + 1, each), *(layers or [1]))](
        lens, None if layers else tables, starts, units, arrived, fresh, lines, programs,
        *([] if layers else [0]), *lens.stride(), *((0, 0) if layers else tables.stride()[:2]),
        HEADS=heads, SAME=same, TILE=tile, LINE_COST=line_cost, LINES_PAD=lines_pad, EACH=each, num_warps=4,
    )  # fmt: skip
    return Shares(starts, units, arrived, fresh)
