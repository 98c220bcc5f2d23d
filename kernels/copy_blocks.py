"""Copy whole blocks in every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.layout import check_all_layers, check_index


def copy_blocks(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole blocks in every layer.

    Args:
        k_cache, v_cache: [L, num_blocks, H, b, d], all layers; float32, float16 or bfloat16; written in place.
        src, dst: int64 [N]; no block is in both.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(k_cache, v_cache, src, dst)
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton()(k_cache, v_cache, src, dst)
    else:
        copy_blocks_torch(k_cache, v_cache, src, dst)


def _check(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Check the arguments of `copy_blocks`. Raises ValueError naming the argument, its value and the remedy."""
    check_all_layers(k_cache, v_cache)
    check_index("src", src, torch.int64, (src.numel(),), k_cache.device)
    check_index("dst", dst, torch.int64, (src.numel(),), k_cache.device)


def copy_blocks_reference(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """`copy_blocks`, pair by pair."""
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        k_cache[:, target] = k_cache[:, source]
        v_cache[:, target] = v_cache[:, source]


def copy_blocks_torch(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """`copy_blocks`, all layers at once."""
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        k_cache[:, target].copy_(k_cache[:, source])
        v_cache[:, target].copy_(v_cache[:, source])


@cache
def _triton() -> Callable:
    from kernels.copy_blocks_triton import copy_blocks_triton

    return copy_blocks_triton
