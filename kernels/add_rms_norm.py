"""Residual add and RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from kernels.layout import check_index, check_rows, fail

MAX_WIDTH = 16384
"""Of a hidden state: a program of `add_rms_norm` holds a whole row."""


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Add to the residual stream, then RMSNorm (arXiv:1910.07467) of the sum.

    Args:
        hidden: [T, width], last dimension contiguous, width up to 16384; float32, float16 or bfloat16; `delta` is added
            in place.
        delta: [T, width], last dimension contiguous, of hidden's dtype; None: hidden is only read.
        weight: [width], of hidden's dtype.
        eps: added to the mean square.
        offset: added to the weight, in float32 (1 in Gemma's models).

    Returns:
        [T, width], hidden's dtype: computed in float32 from the rounded sum, and rounded once.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(hidden, delta, weight)
    if hidden.is_cuda:
        with torch.cuda.device(hidden.device):
            return _triton()(hidden, delta, weight, eps, offset)
    return add_rms_norm_torch(hidden, delta, weight, eps, offset)


def _check(hidden: Tensor, delta: Tensor | None, weight: Tensor) -> None:
    """Check the arguments of `add_rms_norm`. Raises ValueError naming the argument, its value and the remedy."""
    tokens, width = check_rows("hidden", hidden)
    if width > MAX_WIDTH:
        fail("hidden", "width", width, f"use up to {MAX_WIDTH}")
    if delta is not None:
        check_index("delta", delta, hidden.dtype, (tokens, width), hidden.device, "hidden")
    check_index("weight", weight, hidden.dtype, (width,), hidden.device, "hidden")


def add_rms_norm_reference(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> Tensor:
    """`add_rms_norm`: x / sqrt(mean(x^2) + eps) * (weight + offset) of each row x of the rounded sum."""
    if delta is not None:
        hidden.copy_(hidden.float() + delta.float())
    return rms_norm_reference(hidden, weight, eps, offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Over the last dimension, in float32, rounded once to x's dtype."""
    exact = x.float()
    scale = 1 / (exact.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return (exact * scale * (weight.float() + offset)).to(x.dtype)


def add_rms_norm_torch(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`add_rms_norm`."""
    if delta is not None:
        hidden += delta
    return rms_norm_torch(hidden, weight, eps, offset)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Over the last dimension; a weight with an offset isn't rounded to x's dtype."""
    if offset == 0.0:
        return rms_norm(x, weight.shape, weight, eps)
    return rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)


@cache
def _triton() -> Callable:
    from kernels.add_rms_norm_triton import add_rms_norm_triton

    return add_rms_norm_triton
