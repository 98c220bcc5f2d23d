"""Copy whole blocks in every layer, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192
"""Elements that one program copies."""


@triton.jit(do_not_specialize=["src_ptr", "dst_ptr"])
def _copy_chunks(k_ptr, v_ptr, src_ptr, dst_ptr, layer_stride, block_stride, size, CHUNK: tl.constexpr):
    """One pair of blocks, layer and chunk of `size` contiguous elements."""
    pair = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64) * layer_stride
    source = layer + tl.load(src_ptr + pair) * block_stride
    target = layer + tl.load(dst_ptr + pair) * block_stride
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    k = tl.load(k_ptr + source + index, mask=index < size)
    v = tl.load(v_ptr + source + index, mask=index < size)
    tl.store(k_ptr + target + index, k, mask=index < size)
    tl.store(v_ptr + target + index, v, mask=index < size)


def copy_blocks_triton(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """`copy_blocks` in one launch.

    Args:
        k_cache, v_cache: [L, num_blocks, H, b, d], all layers; written in place.
        src, dst: int64 [N]; no block is in both.
    """
    layers, _, heads, block_size, head_dim = k_cache.shape
    size = heads * block_size * head_dim
    if src.numel() == 0:
        return
    _copy_chunks[(triton.cdiv(size, CHUNK), src.numel(), layers)](
        k_cache, v_cache, src, dst, k_cache.stride(0), k_cache.stride(1), size, CHUNK=CHUNK, num_warps=8
    )
