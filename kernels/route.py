"""The experts of a token and their shares: a router."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import check_index, check_rows, fail


def route(x: Tensor, weight: Tensor, bias: Tensor | None, active: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The `active` largest of softmax(x @ weight.T + bias), in float32 whatever x's dtype.

    Args:
        x: [T, width], last dimension contiguous; float32, float16 or bfloat16.
        weight: float32 [E, width], contiguous.
        bias: float32 [E], or None.
        active: of E, at least 1.
        normalized: whether those of a token are divided by their sum.

    Returns:
        shares float32 [T, active], the largest first; experts int64 [T, active], none twice, also where x is NaN.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    width = check_rows("x", x)[1]
    check_index("weight", weight, torch.float32, (-1, width), x.device, "x")
    if not weight.is_contiguous():
        fail("weight", "stride", weight.stride(), "make it contiguous")
    if bias is not None:
        check_index("bias", bias, torch.float32, (len(weight),), x.device, "x")
    if not 1 <= active <= len(weight):
        fail("active", "value", active, f"give 1 to {len(weight)}, the experts that there are")
    if x.is_cuda:
        with torch.cuda.device(x.device):
            return _triton()(x, weight, bias, active, normalized)
    return route_torch(x, weight, bias, active, normalized)


def route_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: int, normalized: bool
) -> tuple[Tensor, Tensor]:
    """`route`, in float64; of equal logits the first."""
    logits = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    experts = logits.argsort(dim=1, descending=True, stable=True)[:, :active]
    shares = logits.softmax(1).gather(1, experts)
    return (shares / shares.sum(1, keepdim=True) if normalized else shares).float(), experts


def route_torch(x: Tensor, weight: Tensor, bias: Tensor | None, active: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """`route`."""
    shares, experts = F.linear(x.float(), weight, bias).softmax(-1).topk(active)
    return (shares / shares.sum(-1, keepdim=True) if normalized else shares), experts


@cache
def _triton() -> Callable:
    from kernels.route_triton import route_triton

    return route_triton
