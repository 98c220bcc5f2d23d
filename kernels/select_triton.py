"""The best slots of each layer and KV head, in slot order, in Triton.

A row is one program's registers. Its k-th largest score is found bit by bit on the scores' order-preserving integer
images, then two prefix sums break ties and place the survivors: no sort, no atomics, the same answer every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAD = tl.constexpr(-1)


@triton.jit
def _ordered_image(x):
    """int32 with the order of float32 x, the two zeros equal; never the least int32, as x is not NaN."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit(do_not_specialize=["must_ptr", "lens_ptr", "keep_ptr", "max_keep"])
def _select_rows(
    scores_ptr,
    forced_ptr,
    lens_ptr,
    keep_ptr,
    kept_ptr,
    width,
    max_keep,
    forced_layer_stride,
    forced_row_stride,
    forced_head_stride,
    lens_layer_stride,
    lens_row_stride,
    lens_head_stride,
    keep_layer_stride,
    keep_row_stride,
    keep_head_stride,
    HEADS: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
):
    """One layer, request and KV head."""
    pair = tl.program_id(0)
    row = pair // HEADS
    layer = tl.program_id(1).to(tl.int64)
    head = pair % HEADS
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    most = tl.load(keep_ptr + layer * keep_layer_stride + row * keep_row_stride + head * keep_head_stride)
    count = tl.minimum(most, length)
    line = layer * tl.num_programs(0) + pair
    slot = tl.arange(0, WIDTH_PAD)
    held = slot < length
    scores = tl.load(scores_ptr + line * width + slot, mask=held, other=0.0)
    forced_line = forced_ptr + layer * forced_layer_stride + row * forced_row_stride + head * forced_head_stride
    forced = tl.load(forced_line + slot, mask=held, other=0) != 0

    least = -2147483648
    image = tl.where(held & (forced == 0), _ordered_image(scores), least)
    wanted = count - tl.sum(forced.to(tl.int32), 0)
    enough = tl.sum((image >= 0).to(tl.int32), 0) >= wanted
    threshold = tl.where(enough, 0, least)  # the largest number that `wanted` images reach
    for step in range(31):
        higher = threshold | (1 << (30 - step))
        enough = tl.sum((image >= higher).to(tl.int32), 0) >= wanted
        threshold = tl.where(enough, higher, threshold)

    above = image > threshold
    tied = (image == threshold) & (image > least)
    ties = tied.to(tl.int32)
    younger = tl.sum(ties, 0) - tl.cumsum(ties, 0)
    chosen = forced | above | (tied & (younger < wanted - tl.sum(above.to(tl.int32), 0)))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    kept_row = kept_ptr + line * max_keep
    tl.store(kept_row + place, slot, mask=chosen & (place < max_keep))
    total = tl.sum(chosen.to(tl.int32), 0)
    tl.store(kept_row + slot, tl.full([WIDTH_PAD], PAD, tl.int32), mask=(slot >= total) & (slot < max_keep))


def select_triton(scores: Tensor, forced: Tensor, lens: Tensor, keep: Tensor, max_keep: int) -> Tensor:
    """`select` in one launch.

    Args:
        scores: float32 [L, R, H, N], contiguous.
        forced: bool [L, R, H, N], last dimension contiguous.
        lens, keep: int32 [L, R, H], of any strides.
        max_keep: up to N.

    Returns:
        int32 [L, R, H, max_keep].
    """
    layers, requests, heads, width = scores.shape
    kept = torch.empty((layers, requests, heads, max_keep), dtype=torch.int32, device=scores.device)
    if kept.numel() == 0:
        return kept
    strides = *forced.stride()[:3], *lens.stride(), *keep.stride()
    width_pad = triton.next_power_of_2(width)
    _select_rows[(requests * heads, layers)](
        scores, forced.view(torch.uint8), lens, keep, kept, width, max_keep, *strides,
        HEADS=heads, WIDTH_PAD=width_pad, num_warps=min(16, max(1, width_pad // 512)),
    )  # fmt: skip
    return kept
