"""RMSNorm of each head times a gate, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs

ELEMENTS = 2048
"""Of a token that one program has."""


@triton.jit
def _norm_heads(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    eps,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One token and HEADS_TILE of its heads."""
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)[:, None]
    dims = tl.arange(0, DIM_PAD)[None, :]
    inside = (heads < HEADS) & (dims < DIM)
    dtype = out_ptr.dtype.element_ty
    places = (token * HEADS + heads) * DIM + dims
    x = tl.load(x_ptr + places, mask=inside, other=0.0)
    gate_places = gate_ptr + token * token_stride + heads * head_stride + dims
    gate = tl.load(gate_places, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]).to(dtype).to(tl.float32)
    scaled = (weight * normed).to(dtype).to(tl.float32)
    tl.store(out_ptr + places, (scaled * (gate / (1.0 + tl.exp(-gate)))).to(dtype), mask=inside)


def gated_norm_triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gated_norm` in one launch.

    Args:
        x: float32 [T, H, d], contiguous; gate: [T, H, d], last dimension contiguous; weight: [d].

    Returns:
        [T, H, d] of the gate's dtype, contiguous.
    """
    tokens, heads, dim = gate.shape
    out = torch.empty((tokens, heads, dim), dtype=gate.dtype, device=gate.device)
    if tokens:
        dim_pad = triton.next_power_of_2(dim)
        tile = min(triton.next_power_of_2(heads), max(1, ELEMENTS // dim_pad))
        _norm_heads[(tokens, triton.cdiv(heads, tile))](
            x, gate, weight, out, eps, *gate.stride()[:2],
            HEADS=heads, HEADS_TILE=tile, DIM=dim, DIM_PAD=dim_pad, num_warps=4, **dependent_launch(gate),
        )  # fmt: skip
    return out
