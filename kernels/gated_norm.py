"""RMSNorm of each head times a gate (Mamba2, arXiv:2405.21060)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import DTYPES, check_index, fail


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / rms(x)`, rounded to the gate's dtype as weight is multiplied, then times silu of the gate.

    Args:
        x: float32 [T, H, d], contiguous.
        gate: [T, H, d], float32, float16 or bfloat16, last dimension contiguous.
        weight: [d], of its dtype.
        eps: added to the mean square.

    Returns:
        [T, H, d] of the gate's dtype, contiguous.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    if gate.dim() != 3:
        fail("gate", "shape", tuple(gate.shape), "give [tokens, heads, dimensions]")
    if gate.dtype not in DTYPES:
        fail("gate", "dtype", gate.dtype, "use float32, float16 or bfloat16")
    check_index("gate", gate, gate.dtype, tuple(gate.shape), gate.device, "gate")
    check_index("x", x, torch.float32, tuple(gate.shape), gate.device, "gate")
    if not x.is_contiguous():
        fail("x", "stride", x.stride(), "make it contiguous")
    check_index("weight", weight, gate.dtype, (gate.shape[2],), gate.device, "gate")
    if gate.is_cuda:
        with torch.cuda.device(gate.device):
            return _triton()(x, gate, weight, eps)
    return gated_norm_torch(x, gate, weight, eps)


def gated_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gated_norm` in float32 throughout."""
    normed = weight.float() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * F.silu(gate.float())


def gated_norm_torch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gated_norm`, by operations of their own."""
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return ((weight * x.to(gate.dtype)).float() * F.silu(gate.float())).to(gate.dtype)


@cache
def _triton() -> Callable:
    from kernels.gated_norm_triton import gated_norm_triton

    return gated_norm_triton
