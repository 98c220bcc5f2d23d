"""Fold stored scores of earlier compressions into new ones, in Triton (G-KV, arXiv 2512.00504)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", "carried_ptr", "table_stride"])
def _fold_stored(
    scores_ptr,
    stored_ptr,
    out_ptr,
    table_ptr,
    lens_ptr,
    carried_ptr,
    alpha,
    width,
    layer_stride,
    table_stride,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
):
    """One layer, request, KV head and tile of slots."""
    pair = tl.program_id(1)
    row = pair // HEADS
    head = pair % HEADS
    layer = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    carried = slot < tl.minimum(tl.load(carried_ptr + row), tl.load(lens_ptr + row))
    block = tl.load(table_ptr + row.to(tl.int64) * table_stride + slot // BLOCK_SIZE, mask=carried, other=0)
    entry = (block.to(tl.int64) * HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    old = tl.load(stored_ptr + layer * layer_stride + entry, mask=carried, other=0.0) * alpha
    place = (layer * tl.num_programs(1) + pair) * width + slot
    new = tl.load(scores_ptr + place, mask=slot < width, other=0.0)
    folded = new + old if ADD else tl.maximum(new, old)
    tl.store(out_ptr + place, tl.where(carried, folded, new), mask=slot < width)


def update_global_score_triton(
    scores: Tensor,
    stored: Tensor,
    block_tables: Tensor,
    lens: Tensor,
    num_carried: Tensor,
    alpha: float,
    *,
    kind: str = "max",
) -> Tensor:
    """`reference.update_global_score` in one launch.

    Args:
        scores: float32 [L, R, H, N], contiguous.
        stored: float32 [L, num_blocks, H, b].
        block_tables: int32 [R, N / b].
        lens, num_carried: int32 [R].
        alpha: decay of the stored score.
        kind: "max" or "sum".

    Returns:
        float32 [L, R, H, N].
    """
    layers, requests, heads, width = scores.shape
    out = torch.empty_like(scores)
    if out.numel() == 0:
        return out
    _fold_stored[(triton.cdiv(width, TILE), requests * heads, layers)](
        scores, stored, out, block_tables, lens, num_carried, alpha, width, stored.stride(0), block_tables.stride(0),
        HEADS=heads, BLOCK_SIZE=stored.shape[3], ADD=kind == "sum", TILE=TILE, num_warps=4,
    )  # fmt: skip
    return out
