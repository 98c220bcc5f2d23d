"""Weights on their way into the L2 cache while a small kernel runs, for the matrix product behind it.

A product of few rows lasts as long as its weight takes to be read, and small kernels before it leave the memory idle.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

PREFETCH_BYTES = 0
"""Of a weight: what the memory brings in while a small kernel runs and the next one starts."""

LANES = tl.constexpr(256)
"""Chunks that a program asks for."""

CHUNK_BYTES = tl.constexpr(4096)


@triton.jit
def prefetch(weight_ptr, program, num_chunks):
    """Ask for LANES chunks of a weight from chunk `program * LANES` on; past `num_chunks` for none. Nothing waits."""
    if program * LANES < num_chunks:
        chunk = tl.minimum(program * LANES + tl.arange(0, LANES), num_chunks - 1)
        per_chunk: tl.constexpr = CHUNK_BYTES * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth
        addresses = (weight_ptr + chunk * per_chunk).to(tl.int64)
        tl.inline_asm_elementwise(
            "{ cp.async.bulk.prefetch.L2.global [$1], 4096; mov.u32 $0, 0; }",
            "=r,l",
            [addresses],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@functools.cache
def _can_prefetch(device: torch.device) -> bool:
    """From Hopper on, where the instruction is."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def num_chunks(weight: Tensor | None) -> int:
    """Chunks of a contiguous weight to ask for; 0 where there is none, or no instruction to do so."""
    if weight is None or not _can_prefetch(weight.device):
        return 0
    return min(weight.nbytes, PREFETCH_BYTES) // CHUNK_BYTES.value
