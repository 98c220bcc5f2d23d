"""The gate of a GeGLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import gelu

from kernels.layout import check_rows, fail


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, the gate of a GeGLU (arXiv:2002.05202), where tanh approximates GELU (arXiv:1606.08415).

    Args:
        gate_up: [T, 2 * width], last dimension contiguous, a row gate and then up; float32, float16 or bfloat16.

    Returns:
        [T, width], gate_up's dtype; gelu(gate) is rounded to it before the product.

    Raises:
        ValueError: the argument's shape, dtype or layout is not as above.
    """
    _check(gate_up)
    if gate_up.is_cuda:
        with torch.cuda.device(gate_up.device):
            return _triton()(gate_up)
    return gelu_mul_torch(gate_up)


def _check(gate_up: Tensor) -> None:
    """Check the argument of `gelu_mul`. Raises ValueError naming it, its value and the remedy."""
    width = check_rows("gate_up", gate_up)[1]
    if width % 2:
        fail("gate_up", "width", width, "give as many columns of up as of gate")


def gelu_mul_reference(gate_up: Tensor) -> Tensor:
    """`gelu_mul`, where gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), in double precision."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    inner = (2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    activated = (gate / 2 * (1 + torch.tanh(inner))).to(gate_up.dtype)
    return (activated * up).to(gate_up.dtype)


def gelu_mul_torch(gate_up: Tensor) -> Tensor:
    """`gelu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate, approximate="tanh").mul_(up)


@cache
def _triton() -> Callable:
    from kernels.gelu_mul_triton import gelu_mul_triton

    return gelu_mul_triton
