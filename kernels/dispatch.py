"""The kernels as the engine calls them: arguments checked, then Triton for CUDA tensors and PyTorch for the others.

Triton is imported at the first CUDA call, so that a machine without it runs everything on its CPU.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels import cpu, layout


@functools.cache
def _triton() -> SimpleNamespace:
    from kernels.block_copy import copy_blocks_triton
    from kernels.kv_store import store_kv_triton
    from kernels.paged_decode import paged_decode_triton
    from kernels.paged_prefill import paged_prefill_triton

    return SimpleNamespace(
        store_kv=store_kv_triton,
        paged_decode=paged_decode_triton,
        paged_prefill=paged_prefill_triton,
        copy_blocks=copy_blocks_triton,
    )


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write each token's K and V into its slot.

    Args:
        k, v: [T, H, d], last dimension contiguous, of the caches' dtype.
        k_cache, v_cache: [num_blocks, H, b, d], one layer; float32, float16 or bfloat16; written in place.
        slots: int64 [T], `block_id * b + offset`; -1 stores nothing. Two tokens never share a slot.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_store(k, v, k_cache, v_cache, slots)
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton().store_kv(k, v, k_cache, v_cache, slots)
    else:
        cpu.store_kv_torch(k, v, k_cache, v_cache, slots)


def paged_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cache_lens: Tensor, scale: float
) -> Tensor:
    """Attention of one query a request over its entries.

    Args:
        q: [B, Hq, d], last dimension contiguous, of the caches' dtype; Hq a multiple of H.
        k_cache, v_cache: [num_blocks, H, b, d], one layer; float32, float16 or bfloat16.
        block_tables: int32 [B, max_blocks]; never read past ceil(cache_len / b).
        cache_lens: int32 [B], the current token's entry included; 0 gives zeros.
        scale: of the scores, before the softmax.

    Returns:
        [B, Hq, d], q's dtype. The softmax is in float32.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_decode(q, k_cache, v_cache, block_tables, cache_lens)
    if q.is_cuda:
        with torch.cuda.device(q.device):
            return _triton().paged_decode(q, k_cache, v_cache, block_tables, cache_lens, scale)
    return cpu.paged_decode_torch(q, k_cache, v_cache, block_tables, cache_lens, scale)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """Causal attention of each request's new queries, which are its last entries, over all its entries.

    Args:
        q: [T, Hq, d], requests one after the other, last dimension contiguous, of the caches' dtype.
        k_cache, v_cache: [num_blocks, H, b, d], one layer; float32, float16 or bfloat16.
        block_tables: int32 [B, max_blocks]; never read past ceil(cache_len / b).
        cu_seqlens: int32 [B + 1]; request r's queries are q[cu_seqlens[r] : cu_seqlens[r + 1]].
        cache_lens: int32 [B], the chunk included. Query i of n sees entries 0 .. cache_len - n + i.
        max_seqlen: queries of the longest request.
        scale: of the scores, before the softmax.

    Returns:
        [T, Hq, d], q's dtype. The softmax is in float32. Rows of tokens that belong to no request are undefined.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_prefill(q, k_cache, v_cache, block_tables, cu_seqlens, cache_lens, max_seqlen)
    if q.is_cuda:
        with torch.cuda.device(q.device):
            return _triton().paged_prefill(q, k_cache, v_cache, block_tables, cu_seqlens, cache_lens, max_seqlen, scale)
    return cpu.paged_prefill_torch(q, k_cache, v_cache, block_tables, cu_seqlens, cache_lens, max_seqlen, scale)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole blocks in every layer.

    Args:
        k_cache, v_cache: [L, num_blocks, H, b, d], all layers; float32, float16 or bfloat16; written in place.
        src, dst: int64 [N]; no block is in both.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_copy(k_cache, v_cache, src, dst)
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton().copy_blocks(k_cache, v_cache, src, dst)
    else:
        cpu.copy_blocks_torch(k_cache, v_cache, src, dst)
