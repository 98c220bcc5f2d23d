"""Products of few rows with a weight that each program reads its own part of, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.dependent_launch import dependent_launch
from kernels.linear_tiles import Tile, padded_rows

PREFETCH = 256
"""Columns of its weights that a program asks for while it waits for its input; no width is smaller."""


@triton.jit
def _few_rows(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    width,
    x_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWAPPED: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """All rows of OUTPUTS columns of the output. SWAPPED: the weights are the left matrix, of which Hopper's matrix
    units take 64 rows at least."""
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    weights = weight_ptr + columns.to(tl.int64) * width
    if DEPENDENT:
        gdc_launch_dependents()
        lines = weights[:, None] + 64 * tl.arange(0, PREFETCH // 64)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
        gdc_wait()
    row = tl.arange(0, ROWS)
    inside = row < rows
    depth = tl.arange(0, DEPTH)
    x_rows = x_ptr + row.to(tl.int64) * x_stride
    if SWAPPED:
        acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for start in range(0, width, DEPTH):
            x = tl.load(x_rows[None, :] + (start + depth)[:, None], mask=inside[None, :], other=0.0)
            acc = tl.dot(tl.load(weights[:, None] + (start + depth)[None, :]), x, acc)
        acc = tl.trans(acc)
    else:
        acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for start in range(0, width, DEPTH):
            x = tl.load(x_rows[:, None] + (start + depth)[None, :], mask=inside[:, None], other=0.0)
            acc = tl.dot(x, tl.load(weights[None, :] + (start + depth)[:, None]), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * outputs + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, tile: Tile) -> Tensor:
    """`linear` of few rows in one launch.

    Args:
        x: [T, width], last dimension contiguous.
        weight: [outputs, width], contiguous; whole tiles.
        bias: [outputs] or None.
        out: [T, outputs], contiguous, or None.
        tile: what a program does at a time.

    Returns:
        `out`, or [T, outputs], contiguous.
    """
    rows, (outputs, width) = x.shape[0], weight.shape
    if out is None:
        out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    _few_rows[(outputs // tile.outputs,)](
        x, weight, bias, out, rows, outputs, width, x.stride(0),
        ROWS=padded_rows(rows), OUTPUTS=tile.outputs, DEPTH=tile.depth, SWAPPED=tile.outputs >= 64,
        PREFETCH=PREFETCH, num_warps=4, num_stages=tile.stages, **dependent_launch(x),
    )  # fmt: skip
    return out
