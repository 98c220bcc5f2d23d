"""Products with a weight, of which those of few rows are bound by reading it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import check_index, check_rows, fail
from kernels.linear_tiles import Tile, find_tile


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: [T, width], last dimension contiguous; float32, float16 or bfloat16.
        weight: [outputs, width], last dimension contiguous, of x's dtype.
        bias: [outputs], of x's dtype; None: none.
        out: [T, outputs], contiguous, of x's dtype, to be written; None: new memory.

    Returns:
        `out`, or [T, outputs], x's dtype: summed in float32 and rounded once.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(x, weight, bias, out)
    tile = _tile(x, weight)
    if tile is not None:
        with torch.cuda.device(x.device):
            return _triton()(x, weight, bias, out, tile)
    return linear_torch(x, weight, bias, out)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    """Check the arguments of `linear`. Raises ValueError naming the argument, its value and the remedy."""
    width = check_rows("x", x)[1]
    check_index("weight", weight, x.dtype, (-1, width), x.device, "x")
    if bias is not None:
        check_index("bias", bias, x.dtype, (weight.shape[0],), x.device, "x")
    if out is not None:
        check_index("out", out, x.dtype, (len(x), len(weight)), x.device, "x")
        if not out.is_contiguous():
            fail("out", "stride", out.stride(), "make it contiguous")


def _tile(x: Tensor, weight: Tensor) -> Tile | None:
    """Of the kernel for few rows, where it is the faster one: on Hopper, in 16 bits."""
    if not x.is_cuda or x.itemsize != 2 or x.stride(0) % 8 or not weight.is_contiguous() or not _is_hopper(x.device):
        return None
    return find_tile(len(x), *weight.shape)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`."""
    out = x.float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`linear`."""
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


@cache
def _triton() -> Callable:
    from kernels.linear_triton import linear_triton

    return linear_triton
