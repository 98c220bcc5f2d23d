"""The gate of a SwiGLU (Shazeer 2020, arXiv:2002.05202), in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.prefetch import num_chunks, prefetch

TILE = 1024


@triton.jit(do_not_specialize=["next_ptr", "next_chunks"])
def _gate_tile(
    gate_up_ptr, out_ptr, next_ptr, token_stride, width, next_chunks, TILE: tl.constexpr, PREFETCH: tl.constexpr
):
    """One token and TILE columns."""
    if PREFETCH:
        prefetch(next_ptr, tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), next_chunks)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    gate_ptrs = gate_up_ptr + token * token_stride + columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + token * width + columns, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul_triton(gate_up: Tensor, next_weight: Tensor | None = None) -> Tensor:
    """`reference.silu_mul` in one launch.

    Args:
        gate_up: [T, 2 * width], last dimension contiguous.
        next_weight: contiguous, read by what is launched next; its beginning is prefetched.

    Returns:
        [T, width], contiguous.
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens > 0:
        chunks = num_chunks(next_weight)
        _gate_tile[(tokens, triton.cdiv(width, TILE))](
            gate_up, out, next_weight if chunks else gate_up, gate_up.stride(0), width, chunks,
            TILE=TILE, PREFETCH=chunks > 0, num_warps=4,
        )  # fmt: skip
    return out
