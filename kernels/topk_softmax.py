"""The experts of a token and their shares, from a router's logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.layout import check_rows, fail


def topk_softmax(logits: Tensor, active: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The `active` largest of softmax(logits).

    Args:
        logits: float32 [T, E], last dimension contiguous.
        active: of E, at least 1.
        normalized: whether those of a token are divided by their sum.

    Returns:
        shares float32 [T, active], the largest first; experts int64 [T, active], none twice, also where logits are NaN.

    Raises:
        ValueError: an argument's shape, dtype or layout is not as above.
    """
    num_experts = check_rows("logits", logits)[1]
    if logits.dtype != torch.float32:
        fail("logits", "dtype", logits.dtype, "convert them to torch.float32")
    if not 1 <= active <= num_experts:
        fail("active", "value", active, f"give 1 to {num_experts}, the experts that there are")
    if logits.is_cuda:
        with torch.cuda.device(logits.device):
            return _triton()(logits, active, normalized)
    return topk_softmax_torch(logits, active, normalized)


def topk_softmax_reference(logits: Tensor, active: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """`topk_softmax`, in float64; of equal logits the first."""
    experts = logits.argsort(dim=1, descending=True, stable=True)[:, :active]
    shares = logits.double().softmax(1).gather(1, experts)
    return (shares / shares.sum(1, keepdim=True) if normalized else shares).float(), experts


def topk_softmax_torch(logits: Tensor, active: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """`topk_softmax`."""
    shares, experts = logits.softmax(-1).topk(active)
    return (shares / shares.sum(-1, keepdim=True) if normalized else shares), experts


@cache
def _triton() -> Callable:
    from kernels.topk_softmax_triton import topk_softmax_triton

    return topk_softmax_triton
