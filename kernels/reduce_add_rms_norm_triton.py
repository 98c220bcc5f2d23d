"""Sum over ranks, residual add and RMSNorm of whole rows, in one Triton launch on each rank."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.peers import Peers


@triton.jit
def _reduce_row(
    parts_ptr,
    signals_ptr,
    hidden_ptr,
    weight_ptr,
    out_ptr,
    hidden_stride,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    SIGNALS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
):
    """One row: tell the others that this rank's part is written, wait for theirs, sum.

    A kernel begins when those before it on its stream have ended, so a part is written when any of its rank's programs
    runs. A signal is set once the one before it was seen.
    """
    row = tl.program_id(0).to(tl.int64)
    if SIGNALS:
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                theirs = tl.load(signals_ptr + peer).to(tl.pointer_type(tl.int32)) + row * SIZE + RANK
                while tl.atomic_cas(theirs, 0, 1, sem="release", scope="sys") != 0:
                    pass
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                ours = tl.load(signals_ptr + RANK).to(tl.pointer_type(tl.int32)) + row * SIZE + peer
                while tl.atomic_cas(ours, 1, 0, sem="acquire", scope="sys") != 1:
                    pass
        tl.debug_barrier()
    columns = tl.arange(0, WIDTH_PAD)
    inside = columns < WIDTH
    x = tl.load(hidden_ptr + row * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH_PAD,), dtype=tl.float32)
    for peer in tl.static_range(SIZE):
        part = tl.load(parts_ptr + peer).to(tl.pointer_type(hidden_ptr.dtype.element_ty))
        total += tl.load(part + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = (x + total).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row * hidden_stride + columns, rounded, mask=inside)
    x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * weight
    tl.store(out_ptr + row * WIDTH + columns, normed.to(out_ptr.dtype.element_ty), mask=inside)


def reduce_add_rms_norm_triton(peers: Peers, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reduce_add_rms_norm`."""
    tokens, width = hidden.shape
    out = torch.empty((tokens, width), dtype=hidden.dtype, device=hidden.device)
    if tokens == 0:
        return out
    width_pad = triton.next_power_of_2(width)
    _reduce_row[(tokens,)](
        peers.part_pointers, peers.signal_pointers, hidden, weight, out, hidden.stride(0), eps,
        RANK=peers.rank, SIZE=len(peers.parts), SIGNALS=peers.signals is not None,
        WIDTH=width, WIDTH_PAD=width_pad, num_warps=max(1, min(16, width_pad // 512)),
    )  # fmt: skip
    return out
