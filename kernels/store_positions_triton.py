"""Store logical positions, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

POSITIONS = 64
"""Tokens whose positions one program stores, in every head of a layer."""


@triton.jit(do_not_specialize=["positions_ptr", "slots_ptr", "tokens"])
def _store_position_tiles(
    positions_ptr,
    state_ptr,
    slots_ptr,
    tokens,
    layer_stride,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One layer and TOKENS tokens, in all heads."""
    index = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.load(slots_ptr + index, mask=index < tokens, other=-1)
    positions = tl.load(positions_ptr + index, mask=index < tokens, other=0)
    heads = tl.arange(0, HEADS_PAD)[:, None]
    entry = slots // BLOCK_SIZE * (HEADS * BLOCK_SIZE) + slots % BLOCK_SIZE
    layer = state_ptr + tl.program_id(1).to(tl.int64) * layer_stride
    values = tl.broadcast_to(positions[None, :], (HEADS_PAD, TOKENS))
    tl.store(layer + entry[None, :] + heads * BLOCK_SIZE, values, mask=(slots >= 0)[None, :] & (heads < HEADS))


def store_positions_triton(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """`store_positions` in one launch.

    Args:
        positions: int32 [T].
        state: int32 [L, num_blocks, H, b]; written in place.
        slots: int64 [T]; -1 stores nothing. Two tokens never share a slot.
    """
    tokens, (layers, _, heads, block_size) = positions.numel(), state.shape
    if tokens == 0:
        return
    _store_position_tiles[(triton.cdiv(tokens, POSITIONS), layers)](
        positions, state, slots, tokens, state.stride(0),
        HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), BLOCK_SIZE=block_size, TOKENS=POSITIONS, num_warps=4,
    )  # fmt: skip
