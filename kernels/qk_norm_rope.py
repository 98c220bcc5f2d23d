"""RMSNorm of query and key heads, and rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.add_rms_norm import rms_norm_reference, rms_norm_torch
from kernels.layout import MAX_HEAD_DIM, check_index, check_rows, fail


def qk_norm_rope(
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
    """RMSNorm of each query and key head, then rotary embedding (arXiv:2104.09864) of the pairs (i, i + r / 2) of its
    first r dimensions; the others stay.

    Args:
        qkv: [T, (Hq + 2 H) * d], last dimension contiguous, a row the heads of q, k and v; float32, float16 or
            bfloat16. Its memory is taken over: it may be overwritten, and v lies in it.
        q_weight, k_weight: [d], of qkv's dtype; None for both: no norm.
        eps: added to the mean square.
        cos: float32 [T, 1, r], each half the same, contiguous; r even, at most d.
        sin: float32 [T, 1, r / 2], contiguous.
        num_heads, num_kv_heads: Hq and H.
        offset: added to the norms' weights, in float32.

    Returns:
        q [T, Hq, d], k and v [T, H, d], views whose last two dimensions are contiguous, of qkv's dtype. The norm is
        rounded to it before the rotation, which is in float32.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    _check(qkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads)
    args = qkv, q_weight, k_weight, eps, cos, sin, num_heads, num_kv_heads, offset
    if qkv.is_cuda:
        with torch.cuda.device(qkv.device):
            return _triton()(*args)
    return qk_norm_rope_torch(*args)


def _check(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    """Check the arguments of `qk_norm_rope`. Raises ValueError naming the argument, its value and the remedy."""
    tokens, width = check_rows("qkv", qkv)
    for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if not isinstance(count, int) or count < 1:
            fail(name, "value", count, "give an int from 1")
    head_dim, left_over = divmod(width, num_heads + 2 * num_kv_heads)
    if left_over or head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        heads = num_heads + 2 * num_kv_heads
        fail("qkv", "width", width, f"give {heads} heads of one even head_dim up to {MAX_HEAD_DIM}")
    rotary_dim = cos.shape[-1] if cos.dim() == 3 else head_dim
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        fail("cos", "width", rotary_dim, f"give an even number of columns up to head_dim {head_dim}")
    for name, x, columns in (("cos", cos, rotary_dim), ("sin", sin, rotary_dim // 2)):
        check_index(name, x, torch.float32, (tokens, 1, columns), qkv.device, "qkv")
        if not x.is_contiguous():
            fail(name, "stride", x.stride(), "make it contiguous")
    if (q_weight is None) != (k_weight is None):
        fail("k_weight", "value", "None" if k_weight is None else "a tensor", "give both norms' weights or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_index(name, weight, qkv.dtype, (head_dim,), qkv.device, "qkv")


def qk_norm_rope_reference(
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
    """`qk_norm_rope`: the norms, rounded, then the rotation of each pair (i, i + r / 2), in float32."""
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None:
        q, k = rms_norm_reference(q, q_weight, eps, offset), rms_norm_reference(k, k_weight, eps, offset)

    def rotate(x: Tensor) -> Tensor:
        half = sin.shape[2]
        first, second, rest = x.float().split((half, half, x.shape[2] - 2 * half), dim=-1)
        cosine = cos[..., :half]
        turned = torch.cat((first * cosine - second * sin, second * cosine + first * sin, rest), dim=-1)
        return turned.to(x.dtype)

    return rotate(q), rotate(k), v


def qk_norm_rope_torch(
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
    """`qk_norm_rope`, all heads together: q and k are views of one new tensor, v of qkv."""
    rotary_dim, half = cos.shape[2], sin.shape[2]
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    head_dim = heads.shape[2]
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None:
        q = rms_norm_torch(qk[:, :num_heads], q_weight, eps, offset)
        k = rms_norm_torch(qk[:, num_heads:], k_weight, eps, offset)
        qk = torch.cat((q, k), dim=1)
    rotated = qk[..., :rotary_dim] * cos
    rotated[..., :half].addcmul_(qk[..., half:rotary_dim], sin, value=-1)
    rotated[..., half:].addcmul_(qk[..., :half], sin)
    if rotary_dim < head_dim:
        rotated = torch.cat((rotated, qk[..., rotary_dim:]), dim=-1)
    q, k = rotated.to(qkv.dtype).split((num_heads, num_kv_heads), dim=1)
    return q, k, v


@cache
def _triton() -> Callable:
    from kernels.qk_norm_rope_triton import qk_norm_rope_triton

    return qk_norm_rope_triton
