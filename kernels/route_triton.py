"""The experts of a token and their shares, in Triton: parts of the logits' sums, then the largest of the sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dependent_launch import dependent_launch, wait_for_inputs

MOST_TOKENS = 256
"""Of 16 bits whose logits are multiplied here: the router is small, so its sums are cut to occupy a GPU."""
ROWS, EXPERTS, DEPTH, PART = 16, 32, 64, 256
"""Tokens and experts of a program, columns at a time and in all."""


@triton.jit
def _multiply_part(
    x_ptr,
    weight_ptr,
    parts_ptr,
    tokens,
    num_experts,
    width,
    x_stride,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PART: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """ROWS tokens, EXPERTS of their logits and PART columns of the width.

    What has 16 bits is exact in TF32, and a weight the sum of two: so three such products leave float32's error.
    """
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    known, held = token < tokens, expert < num_experts
    begin = tl.program_id(2) * PART
    x_rows, weights = x_ptr + token.to(tl.int64) * x_stride, weight_ptr + expert * width
    acc = tl.zeros([ROWS, EXPERTS], tl.float32)
    for start in range(0, PART, DEPTH):
        column = begin + start + tl.arange(0, DEPTH)
        inside = column < width
        x = tl.load(x_rows[:, None] + column[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weights[None, :] + column[:, None], mask=held[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(x.to(tl.float32), weight, acc, input_precision="tf32x3")
    out_ptrs = parts_ptr + (tl.program_id(2) * tokens + token[:, None]) * num_experts + expert[None, :]
    tl.store(out_ptrs, acc, mask=known[:, None] & held[None, :])


@triton.jit
def _choose(
    parts_ptr,
    bias_ptr,
    shares_ptr,
    experts_ptr,
    tokens,
    num_experts,
    PARTS: tl.constexpr,
    ACTIVE: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One token: the largest logit ACTIVE times over, of equal ones the first. What is no number comes last."""
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, EXPERTS)
    inside = number < num_experts
    logits = tl.where(inside, 0.0, float("-inf"))
    for part in tl.static_range(PARTS):
        logits += tl.load(parts_ptr + (part * tokens + token) * num_experts + number, mask=inside, other=0.0)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + number, mask=inside, other=0.0)
    left = tl.where(inside, tl.where(logits > -3.0e38, logits, -3.0e38), float("-inf"))
    weights = tl.exp(logits - tl.max(left, 0))
    slot = tl.arange(0, SLOTS)
    experts = tl.zeros([SLOTS], tl.int64)
    shares = tl.zeros([SLOTS], tl.float32)
    for i in tl.static_range(ACTIVE):
        expert = tl.min(tl.where(left == tl.max(left, 0), number, EXPERTS), 0)
        experts = tl.where(slot == i, expert, experts)
        shares = tl.where(slot == i, tl.sum(tl.where(number == expert, weights, 0.0), 0), shares)
        left = tl.where(number == expert, float("-inf"), left)
    shares = shares / (tl.sum(shares, 0) if NORMALIZED else tl.sum(tl.where(inside, weights, 0.0), 0))
    tl.store(shares_ptr + token * ACTIVE + slot, shares, mask=slot < ACTIVE)
    tl.store(experts_ptr + token * ACTIVE + slot, experts, mask=slot < ACTIVE)


def logit_parts(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [parts, T, E], which sum to x @ weight.T.

    Args:
        x: [T, width] of 16 bits, last dimension contiguous.
        weight: float32 [E, width], contiguous.
    """
    (tokens, width), num_experts = x.shape, len(weight)
    parts = torch.empty((triton.cdiv(width, PART), tokens, num_experts), dtype=torch.float32, device=x.device)
    grid = triton.cdiv(tokens, ROWS), triton.cdiv(num_experts, EXPERTS), len(parts)
    _multiply_part[grid](
        x, weight, parts, tokens, num_experts, width, x.stride(0),
        ROWS=ROWS, EXPERTS=EXPERTS, DEPTH=DEPTH, PART=PART, num_warps=4, num_stages=3, **dependent_launch(x),
    )  # fmt: skip
    return parts


def choose_experts(parts: Tensor, bias: Tensor | None, active: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The `active` largest of softmax(parts.sum(0) + bias), summed in order.

    Args:
        parts: float32 [parts, T, E], contiguous.
        bias, active, normalized: `route`'s.

    Returns:
        shares float32 and experts int64, [T, active], contiguous.
    """
    tokens, num_experts = parts.shape[1:]
    shares = torch.empty((tokens, active), dtype=torch.float32, device=parts.device)
    experts = torch.empty((tokens, active), dtype=torch.int64, device=parts.device)
    _choose[(tokens,)](
        parts, bias, shares, experts, tokens, num_experts, PARTS=len(parts), ACTIVE=active,
        SLOTS=triton.next_power_of_2(active), EXPERTS=triton.next_power_of_2(num_experts),
        NORMALIZED=normalized, num_warps=1, **dependent_launch(shares),
    )  # fmt: skip
    return shares, experts


def route_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: int, normalized: bool
) -> tuple[Tensor, Tensor]:
    """`route` in two launches, of many tokens or in float32 beside the product.

    Args:
        x, weight, bias, active, normalized: `route`'s.

    Returns:
        shares float32 and experts int64, [T, active], contiguous.
    """
    if len(x) == 0:
        return weight.new_empty(0, active), torch.empty((0, active), dtype=torch.int64, device=x.device)
    few = x.itemsize == 2 and len(x) <= MOST_TOKENS
    parts = logit_parts(x, weight) if few else F.linear(x.float(), weight)[None]
    return choose_experts(parts, bias, active, normalized)
