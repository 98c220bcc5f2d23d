"""The sum over ranks of what each computed, residual add and RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.add_rms_norm import MAX_WIDTH, rms_norm_reference
from kernels.layout import check_index, check_rows, fail
from kernels.peers import Peers


def reduce_add_rms_norm(peers: Peers, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Sum the first T rows of all parts, add the sum to the residual stream, then RMSNorm.

    All ranks call it together. Each reads all parts, and sums them in the order of the ranks, so that all get the same
    to the last bit. When a call returns on a stream, other ranks may still read this one's part: it must not be written
    before another call, on other parts, has ended.

    Args:
        peers: parts of at least T rows, of hidden's dtype.
        hidden: [T, width], last dimension contiguous, width up to 16384; float32, float16 or bfloat16; added to in
            place.
        weight: [width], of hidden's dtype.
        eps: added to the mean square.

    Returns:
        [T, width], hidden's dtype: computed in float32 from the rounded sum, and rounded once.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    tokens, width = check_rows("hidden", hidden)
    if width > MAX_WIDTH:
        fail("hidden", "width", width, f"use up to {MAX_WIDTH}")
    check_index("weight", weight, hidden.dtype, (width,), hidden.device, "hidden")
    own = peers.parts[peers.rank]
    check_index("parts", own, hidden.dtype, (len(own), width), hidden.device, "hidden")
    if len(own) < tokens:
        fail("parts", "rows", len(own), f"give at least hidden's {tokens}")
    if hidden.is_cuda:
        with torch.cuda.device(hidden.device):
            return _triton()(peers, hidden, weight, eps)
    return reduce_add_rms_norm_reference(peers, hidden, weight, eps)


def reduce_add_rms_norm_reference(peers: Peers, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reduce_add_rms_norm`, of parts that are there already."""
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for part in peers.parts:
        total += part[: len(hidden)].float()
    hidden.copy_(hidden.float() + total)
    return rms_norm_reference(hidden, weight, eps)


@cache
def _triton() -> Callable:
    from kernels.reduce_add_rms_norm_triton import reduce_add_rms_norm_triton

    return reduce_add_rms_norm_triton
