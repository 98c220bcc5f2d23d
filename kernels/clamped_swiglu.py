"""The gate of gpt-oss's experts (arXiv:2508.10925): a clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.layout import check_rows, fail


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), where gate is at most `limit` and up within it.

    Args:
        gate_up: [T, 2 * width], last dimension contiguous, a row gate and up by turns; float32, float16 or bfloat16.

    Returns:
        [T, width], gate_up's dtype, computed in float32.

    Raises:
        ValueError: the argument's shape, dtype or layout is not as above.
    """
    if check_rows("gate_up", gate_up)[1] % 2:
        fail("gate_up", "width", gate_up.shape[1], "give as many columns of up as of gate")
    if gate_up.is_cuda:
        with torch.cuda.device(gate_up.device):
            return _triton()(gate_up, alpha, limit)
    return clamped_swiglu_torch(gate_up, alpha, limit)


def clamped_swiglu_reference(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """`clamped_swiglu`, where sigmoid(x) = 1 / (1 + exp(-x))."""
    gate = gate_up[:, ::2].float().clamp(max=limit)
    up = gate_up[:, 1::2].float().clamp(-limit, limit)
    return (gate / (1 + torch.exp(-alpha * gate)) * (up + 1)).to(gate_up.dtype)


def clamped_swiglu_torch(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """`clamped_swiglu`."""
    gate, up = gate_up.float().unflatten(1, (-1, 2)).unbind(-1)
    gate = gate.clamp(max=limit)
    return (gate * torch.sigmoid(gate * alpha)).mul_(up.clamp(-limit, limit).add_(1)).to(gate_up.dtype)


@cache
def _triton() -> Callable:
    from kernels.clamped_swiglu_triton import clamped_swiglu_triton

    return clamped_swiglu_triton
