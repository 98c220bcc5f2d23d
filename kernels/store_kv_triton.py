"""Scatter new K and V into their slots, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs


@triton.jit
def store_entries(
    token,
    tile,
    slots_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    block_stride,
    head_stride,
    slots_token_stride,
    slots_head_stride,
    SLOTS_APART: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Store a token's K and V of one tile of heads; nothing at slot -1."""
    heads = tile * HEADS_TILE + tl.arange(0, HEADS_TILE)[:, None]
    dims = tl.arange(0, DIM_PAD)[None, :]
    slot_ptr = slots_ptr + token * slots_token_stride
    if SLOTS_APART:
        slot = tl.load(slot_ptr + heads * slots_head_stride, mask=heads < HEADS, other=-1)
    else:
        slot = tl.load(slot_ptr)
    inside = (heads < tl.where(slot >= 0, HEADS, 0)) & (dims < HEAD_DIM)
    k = tl.load(k_ptr + token * k_token_stride + heads * k_head_stride + dims, mask=inside)
    v = tl.load(v_ptr + token * v_token_stride + heads * v_head_stride + dims, mask=inside)
    entry = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * HEAD_DIM + heads * head_stride + dims
    tl.store(k_cache_ptr + entry, k, mask=inside)
    tl.store(v_cache_ptr + entry, v, mask=inside)


@triton.jit(do_not_specialize=["slots_ptr"])
def _store_tokens(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    block_stride,
    head_stride,
    slots_token_stride,
    slots_head_stride,
    SLOTS_APART: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One token and HEADS_TILE of its heads."""
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    store_entries(
        token, tl.program_id(1), slots_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr,
        k_token_stride, k_head_stride, v_token_stride, v_head_stride, block_stride, head_stride,
        slots_token_stride, slots_head_stride, SLOTS_APART, HEADS, HEADS_TILE, HEAD_DIM, DIM_PAD, BLOCK_SIZE,
    )  # fmt: skip


def store_kv_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`store_kv` in one launch.

    Args:
        k, v: [T, H, d], last dimension contiguous.
        k_cache, v_cache: [num_blocks, H, b, d], one layer, of k's dtype; written in place.
        slots: int64 [T, H]; -1 stores nothing.
    """
    tokens, heads, head_dim = k.shape
    if tokens == 0:
        return
    dim_pad = triton.next_power_of_2(head_dim)
    heads_tile = max(1, min(triton.next_power_of_2(heads), 2048 // dim_pad))
    _store_tokens[(tokens, triton.cdiv(heads, heads_tile))](
        k, v, k_cache, v_cache, slots,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:2], *slots.stride(),
        SLOTS_APART=heads > 1 and slots.stride(1) != 0,
        HEADS=heads, HEADS_TILE=heads_tile, HEAD_DIM=head_dim, DIM_PAD=dim_pad, BLOCK_SIZE=k_cache.shape[2],
        num_warps=4, **dependent_launch(k),
    )  # fmt: skip
