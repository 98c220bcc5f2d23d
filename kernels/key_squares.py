"""Forms of paged keys under whole matrices, for policies that know how queries to come are spread."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import CacheView, check_view, entries_reference
from kernels.layout import check_index, fail

MOST_DIM = 128
"""Of a head."""


def key_squares(view: CacheView, linear: Tensor, matrices: Tensor, turn: Tensor) -> Tensor:
    """linear . K + K'^T M K' of each key K, of G kinds. K' is K turned: each rotary pair by its own angle.

    Dimensions f and f + d / 2 are a rotary pair (x, y), which becomes (x cos - y sin, x sin + y cos).

    Args:
        view: any range of layers, of heads of up to MOST_DIM. V is not read.
        linear: float32 [L, R, H, G, d], the last dimension contiguous. Any other may be expanded, here and below.
        matrices: M, float32 [L, R, H, G, d, d], each contiguous; they need not be symmetric.
        turn: float32 [R, 2, d / 2], cos and sin, or those times a length; the last dimension contiguous.

    Returns:
        float32 [L, R, H, G, N], N = max_blocks * b. 0 past n.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above, or d is odd.
    """
    _check(view, linear, matrices, turn)
    if view.lens.is_cuda:
        with torch.cuda.device(view.lens.device):
            return _triton()(view, linear, matrices, turn)
    return key_squares_reference(view, linear, matrices, turn)


def _check(view: CacheView, linear: Tensor, matrices: Tensor, turn: Tensor) -> None:
    check_view(view, all_layers=True)
    head_dim, device = view.k_cache.shape[4], view.k_cache.device
    if head_dim % 2:
        fail("k_cache", "head_dim", head_dim, "give an even one: its dimensions must be in pairs")
    if head_dim > MOST_DIM:
        fail("k_cache", "head_dim", head_dim, f"give up to {MOST_DIM}")
    check_index("matrices", matrices, torch.float32, (*view.lens.shape, -1, head_dim, head_dim), device)
    if matrices.stride(-2) != head_dim:
        fail("matrices", "stride", matrices.stride(), "make each matrix contiguous")
    check_index("linear", linear, torch.float32, (*view.lens.shape, matrices.shape[3], head_dim), device)
    check_index("turn", turn, torch.float32, (view.lens.shape[1], 2, head_dim // 2), device)


def squares(keys: Tensor, matrices: Tensor, turn: Tensor) -> Tensor:
    """Of keys [..., N, d] under [..., G, d, d], turned by [..., 2, d / 2]: [..., G, N]."""
    x, y = keys.chunk(2, dim=-1)
    cos, sin = turn[..., :1, :], turn[..., 1:, :]
    turned = torch.cat((x * cos - y * sin, x * sin + y * cos), dim=-1)[..., None, :, :]
    return ((turned @ matrices) * turned).sum(dim=-1)


def key_squares_reference(view: CacheView, linear: Tensor, matrices: Tensor, turn: Tensor) -> Tensor:
    """`key_squares`, layer by layer, request by request and head by head."""
    out = torch.zeros(*matrices.shape[:4], view.width, device=matrices.device)
    for line in product(*map(range, view.lens.shape)):
        length = int(view.lens[line])
        if length:
            keys = entries_reference(view.k_cache[line[0]], view.block_tables[line], length, line[2])
            out[*line, :, :length] = linear[line] @ keys.mT + squares(keys, matrices[line], turn[line[1]])
    return out


@cache
def _triton() -> Callable[..., Tensor]:
    from kernels.key_squares_triton import key_squares_triton

    return key_squares_triton
