"""RMSNorm of each query and key head and rotary embedding, in place, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs
from kernels.tiles import load_weight

TILE_ELEMENTS = 1024
"""Elements of a token's heads that one program rotates."""


@triton.jit
def _rotate_heads(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    token_stride,
    eps,
    Q_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One token and HEADS_TILE of its HEADS query and key heads: the rotated halves of a head are two tiles, and the
    REST of it, which a norm alone changes, is a third."""
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)[:, None]
    dims = tl.arange(0, HALF_PAD)[None, :]
    held = dims < HALF
    inside = (heads < HEADS) & held
    head_ptrs = qkv_ptr + token * token_stride + heads * (2 * HALF + REST)
    first_ptrs = head_ptrs + dims
    first = tl.load(first_ptrs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(first_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        is_query = heads < Q_HEADS
        q_first = load_weight(q_weight_ptr + dims, held, OFFSET)
        k_first = load_weight(k_weight_ptr + dims, held, OFFSET)
        q_second = load_weight(q_weight_ptr + HALF + dims, held, OFFSET)
        k_second = load_weight(k_weight_ptr + HALF + dims, held, OFFSET)
        squares = tl.sum(first * first + second * second, 1)
        if REST > 0:
            rest_dims = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
            rest_held = rest_dims < 2 * HALF + REST
            rest_inside = (heads < HEADS) & rest_held
            rest = tl.load(head_ptrs + rest_dims, mask=rest_inside, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / (2 * HALF + REST) + eps)[:, None]
        if REST > 0:
            q_rest = load_weight(q_weight_ptr + rest_dims, rest_held, OFFSET)
            k_rest = load_weight(k_weight_ptr + rest_dims, rest_held, OFFSET)
            rest = rest * scale * tl.where(is_query, q_rest, k_rest)
            tl.store(head_ptrs + rest_dims, rest.to(qkv_ptr.dtype.element_ty), mask=rest_inside)
        first = first * scale * tl.where(is_query, q_first, k_first)
        second = second * scale * tl.where(is_query, q_second, k_second)
        first = first.to(qkv_ptr.dtype.element_ty).to(tl.float32)
        second = second.to(qkv_ptr.dtype.element_ty).to(tl.float32)
    cos = tl.load(cos_ptr + token * (2 * HALF) + dims, mask=held, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + dims, mask=held, other=0.0)
    tl.store(first_ptrs, (first * cos - second * sin).to(qkv_ptr.dtype.element_ty), mask=inside)
    tl.store(first_ptrs + HALF, (second * cos + first * sin).to(qkv_ptr.dtype.element_ty), mask=inside)


def qk_norm_rope_triton(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` in one launch, in place.

    Args:
        qkv: [T, (Hq + 2 H) * d], last dimension contiguous; its queries and keys are overwritten.
        q_weight, k_weight: [d], or None for both: no norm.
        eps: of the norms.
        cos: float32 [T, 1, r], each half the same; sin: float32 [T, 1, r / 2].
        num_heads, num_kv_heads: Hq and H.
        offset: added to the norms' weights.

    Returns:
        q [T, Hq, d], k and v [T, H, d], views of qkv.
    """
    tokens, rotated = qkv.shape[0], num_heads + num_kv_heads
    head_dim, half = qkv.shape[1] // (rotated + num_kv_heads), sin.shape[2]
    if tokens > 0:
        rest = head_dim - 2 * half
        half_pad = triton.next_power_of_2(half)
        heads_tile = max(1, min(triton.next_power_of_2(rotated), TILE_ELEMENTS // (2 * half_pad)))
        norm = q_weight is not None
        _rotate_heads[(tokens, triton.cdiv(rotated, heads_tile))](
            qkv, q_weight if norm else qkv, k_weight if norm else qkv, cos, sin, qkv.stride(0), eps,
            Q_HEADS=num_heads, HEADS=rotated, HEADS_TILE=heads_tile, HALF=half, HALF_PAD=half_pad,
            REST=rest, REST_PAD=triton.next_power_of_2(max(1, rest)), NORM=norm, OFFSET=offset, num_warps=4,
            **dependent_launch(qkv),
        )  # fmt: skip
    return qkv.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
