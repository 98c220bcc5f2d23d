"""The gate of a SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.layout import check_rows, fail


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the gate of a SwiGLU (arXiv:2002.05202).

    Args:
        gate_up: [T, 2 * width], last dimension contiguous, a row gate and then up; float32, float16 or bfloat16.

    Returns:
        [T, width], gate_up's dtype; silu(gate) is rounded to it before the product.

    Raises:
        ValueError: the argument's shape, dtype or layout is not as above.
    """
    _check(gate_up)
    if gate_up.is_cuda:
        with torch.cuda.device(gate_up.device):
            return _triton()(gate_up)
    return silu_mul_torch(gate_up)


def _check(gate_up: Tensor) -> None:
    """Check the argument of `silu_mul`. Raises ValueError naming it, its value and the remedy."""
    width = check_rows("gate_up", gate_up)[1]
    if width % 2:
        fail("gate_up", "width", width, "give as many columns of up as of gate")


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul`, where silu(x) = x / (1 + exp(-x))."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    activated = (gate / (1 + torch.exp(-gate))).to(gate_up.dtype)
    return (activated.float() * up).to(gate_up.dtype)


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """`silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


@cache
def _triton() -> Callable:
    from kernels.silu_mul_triton import silu_mul_triton

    return silu_mul_triton
