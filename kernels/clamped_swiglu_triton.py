"""The gate of gpt-oss's experts, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs

TILE = 1024


@triton.jit
def _clamped_tile(gate_up_ptr, out_ptr, token_stride, width, alpha, limit, TILE: tl.constexpr, DEPENDENT: tl.constexpr):
    """One token and TILE columns of its output."""
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    gate_ptrs = gate_up_ptr + token * token_stride + 2 * columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + 1, mask=inside, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    out = gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
    tl.store(out_ptr + token * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def clamped_swiglu_triton(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """`clamped_swiglu` in one launch.

    Args:
        gate_up: [T, 2 * width], last dimension contiguous.

    Returns:
        [T, width], contiguous.
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens > 0:
        grid = tokens, triton.cdiv(width, TILE)
        _clamped_tile[grid](
            gate_up, out, gate_up.stride(0), width, float(alpha), float(limit),
            TILE=TILE, num_warps=4, **dependent_launch(gate_up),
        )  # fmt: skip
    return out
