"""The experts of a token and their shares, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs


@triton.jit
def _topk(
    logits_ptr,
    shares_ptr,
    experts_ptr,
    token_stride,
    num_experts,
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
    logits = tl.load(logits_ptr + token * token_stride + number, mask=inside, other=float("-inf"))
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


def topk_softmax_triton(logits: Tensor, active: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """`topk_softmax` in one launch.

    Args:
        logits: float32 [T, E], last dimension contiguous.
        active: of E.
        normalized: whether shares are divided by their sum.

    Returns:
        shares float32 and experts int64, [T, active], contiguous.
    """
    tokens, num_experts = logits.shape
    shares = torch.empty((tokens, active), dtype=torch.float32, device=logits.device)
    experts = torch.empty((tokens, active), dtype=torch.int64, device=logits.device)
    if tokens > 0:
        _topk[(tokens,)](
            logits, shares, experts, logits.stride(0), num_experts,
            ACTIVE=active, SLOTS=triton.next_power_of_2(active), EXPERTS=triton.next_power_of_2(num_experts),
            NORMALIZED=normalized, num_warps=1, **dependent_launch(logits),
        )  # fmt: skip
    return shares, experts
