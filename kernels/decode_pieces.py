"""Decode requests cut into pieces of about the same length."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.pieces import Pieces


def decode_pieces(cache_lens: Tensor, k_cache: Tensor, max_blocks: int) -> Pieces | None:
    """How `paged_decode` cuts the requests of a step, to be given to it in every layer.

    Args:
        cache_lens: int32 [B].
        k_cache: [num_blocks, H, b, d], of any layer.
        max_blocks: columns of the block tables.

    Returns:
        The pieces; None on a CPU, which cuts nothing.
    """
    if not k_cache.is_cuda:
        return None
    with torch.cuda.device(k_cache.device):
        return _triton()(cache_lens, k_cache, max_blocks)


@cache
def _triton() -> Callable:
    from kernels.decode_pieces_triton import decode_pieces_triton

    return decode_pieces_triton
