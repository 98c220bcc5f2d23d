"""Residual add and RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) of whole rows, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs
from kernels.tiles import load_weight


@triton.jit
def _norm_row(
    hidden_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    hidden_stride,
    delta_stride,
    eps,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row, held in registers from the add to the last product."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH_PAD)
    inside = columns < WIDTH
    x = tl.load(hidden_ptr + row * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = load_weight(weight_ptr + columns, inside, OFFSET)
    if ADD:
        delta = tl.load(delta_ptr + row * delta_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + delta).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + row * hidden_stride + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * weight
    tl.store(out_ptr + row * WIDTH + columns, normed.to(out_ptr.dtype.element_ty), mask=inside)


def add_rms_norm_triton(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> Tensor:
    """`add_rms_norm` in one launch.

    Args:
        hidden, delta: [T, width], last dimension contiguous; hidden is written in place where there is a delta.
        weight: [width].
        eps: added to the mean square.
        offset: added to the weight.

    Returns:
        [T, width], contiguous.
    """
    tokens, width = hidden.shape
    out = torch.empty((tokens, width), dtype=hidden.dtype, device=hidden.device)
    if tokens == 0:
        return out
    width_pad = triton.next_power_of_2(width)
    delta_or_any = hidden if delta is None else delta
    _norm_row[(tokens,)](
        hidden, delta_or_any, weight, out, hidden.stride(0), delta_or_any.stride(0), eps,
        WIDTH=width, WIDTH_PAD=width_pad, ADD=delta is not None, OFFSET=offset,
        num_warps=max(1, min(16, width_pad // 512)), **dependent_launch(hidden),
    )  # fmt: skip
    return out
