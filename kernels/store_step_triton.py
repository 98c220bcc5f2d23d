"""Store a step's keys, values and window queries in one launch, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs
from kernels.store_kv_triton import store_entries

TILE_ELEMENTS = 2048
"""Elements of a token's heads that one program stores."""


@triton.jit
def _store_query_rows(
    token,
    tile,
    index,
    q_ptr,
    q_cache_ptr,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Store a token's queries of one tile of heads; nothing at index -1."""
    heads = tile * HEADS_TILE + tl.arange(0, HEADS_TILE)[:, None]
    dims = tl.arange(0, DIM_PAD)[None, :]
    inside = (heads < tl.where(index >= 0, HEADS, 0)) & (dims < HEAD_DIM)
    q = tl.load(q_ptr + token * token_stride + heads * head_stride + dims, mask=inside)
    tl.store(q_cache_ptr + (index * HEADS + heads) * HEAD_DIM + dims, q, mask=inside)


@triton.jit(do_not_specialize=["slots_ptr", "indices_ptr"])
def _store_step(
    k_ptr,
    v_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_cache_ptr,
    slots_ptr,
    indices_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    q_token_stride,
    q_head_stride,
    block_stride,
    head_stride,
    slots_token_stride,
    slots_head_stride,
    SLOTS_APART: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    KV_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One token and HEADS_TILE of its KV heads, or, from tile KV_TILES on, of its query heads."""
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tile < KV_TILES:
        store_entries(
            token, tile, slots_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr,
            k_token_stride, k_head_stride, v_token_stride, v_head_stride, block_stride, head_stride,
            slots_token_stride, slots_head_stride, SLOTS_APART, KV_HEADS, HEADS_TILE, HEAD_DIM, DIM_PAD, BLOCK_SIZE,
        )  # fmt: skip
    else:
        _store_query_rows(
            token, tile - KV_TILES, tl.load(indices_ptr + token), q_ptr, q_cache_ptr, q_token_stride, q_head_stride,
            Q_HEADS, HEADS_TILE, HEAD_DIM, DIM_PAD,
        )  # fmt: skip


def store_step_triton(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_cache: Tensor,
    slots: Tensor,
    indices: Tensor,
) -> None:
    """`store_kv` and `store_queries` of the same tokens, in one launch.

    Args:
        k, v: [T, H, d]; q: [T, Hq, d]; last dimension contiguous.
        k_cache, v_cache: [num_blocks, H, b, d], one layer; written in place.
        q_cache: [num_query_slots, w, Hq, d], one layer; written in place.
        slots: int64 [T, H]; indices: int64 [T]; -1 stores nothing.
    """
    tokens, kv_heads, head_dim = k.shape
    query_heads = q.shape[1]
    if tokens == 0:
        return
    dim_pad = triton.next_power_of_2(head_dim)
    heads_tile = max(1, min(triton.next_power_of_2(query_heads), TILE_ELEMENTS // dim_pad))
    kv_tiles = triton.cdiv(kv_heads, heads_tile)
    _store_step[(tokens, kv_tiles + triton.cdiv(query_heads, heads_tile))](
        k, v, q, k_cache, v_cache, q_cache, slots, indices,
        *k.stride()[:2], *v.stride()[:2], *q.stride()[:2], *k_cache.stride()[:2], *slots.stride(),
        SLOTS_APART=kv_heads > 1 and slots.stride(1) != 0,
        Q_HEADS=query_heads, KV_HEADS=kv_heads, HEADS_TILE=heads_tile, KV_TILES=kv_tiles,
        HEAD_DIM=head_dim, DIM_PAD=dim_pad, BLOCK_SIZE=k_cache.shape[2], num_warps=4,
        **dependent_launch(k),
    )  # fmt: skip
