"""The gate of a GeGLU (Shazeer 2020, arXiv:2002.05202), in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs

TILE = 1024


@triton.jit
def _gelu_tile(gate_up_ptr, out_ptr, token_stride, width, TILE: tl.constexpr, DEPENDENT: tl.constexpr):
    """One token and TILE columns."""
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    gate_ptrs = gate_up_ptr + token * token_stride + columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask=inside, other=0.0).to(tl.float32)
    twice_inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    # x / 2 * (1 + tanh(y)) = x * sigmoid(2 y)
    activated = (gate / (1.0 + tl.exp(-twice_inner))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + token * width + columns, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


def gelu_mul_triton(gate_up: Tensor) -> Tensor:
    """`gelu_mul` in one launch.

    Args:
        gate_up: [T, 2 * width], last dimension contiguous.

    Returns:
        [T, width], contiguous.
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens > 0:
        grid = tokens, triton.cdiv(width, TILE)
        _gelu_tile[grid](gate_up, out, gate_up.stride(0), width, TILE=TILE, num_warps=4, **dependent_launch(gate_up))
    return out
