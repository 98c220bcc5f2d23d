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
    slots_layer_stride,
    slots_token_stride,
    slots_head_stride,
    SLOTS_APART: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One layer and TOKENS tokens, in all heads."""
    index = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    positions = tl.load(positions_ptr + index, mask=index < tokens, other=0)
    heads = tl.arange(0, HEADS_PAD)[:, None]
    layer = tl.program_id(1).to(tl.int64)
    if SLOTS_APART:
        slot_ptrs = slots_ptr + layer * slots_layer_stride + index[None, :] * slots_token_stride
        inside = (index < tokens)[None, :] & (heads < HEADS)
        slots = tl.load(slot_ptrs + heads * slots_head_stride, mask=inside, other=-1)
    else:
        slots = tl.load(slots_ptr + index * slots_token_stride, mask=index < tokens, other=-1)[None, :]
    entry = slots // BLOCK_SIZE * (HEADS * BLOCK_SIZE) + slots % BLOCK_SIZE
    values = tl.broadcast_to(positions[None, :], (HEADS_PAD, TOKENS))
    entry_ptrs = state_ptr + layer * layer_stride + entry + heads * BLOCK_SIZE
    tl.store(entry_ptrs, values, mask=(slots >= 0) & (heads < HEADS))


def store_positions_triton(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """`store_positions` in one launch.

    Args:
        positions: int32 [T].
        state: int32 [L, num_blocks, H, b]; written in place.
        slots: int64 [L, T, H]; -1 stores nothing.
    """
    tokens, (layers, _, heads, block_size) = positions.numel(), state.shape
    if tokens == 0:
        return
    _store_position_tiles[(triton.cdiv(tokens, POSITIONS), layers)](
        positions, state, slots, tokens, state.stride(0), *slots.stride(),
        SLOTS_APART=(layers > 1 and slots.stride(0) != 0) or (heads > 1 and slots.stride(2) != 0),
        HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), BLOCK_SIZE=block_size, TOKENS=POSITIONS, num_warps=4,
    )  # fmt: skip
