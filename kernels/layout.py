"""The paged cache's layout: what a valid argument of a kernel is.

One layer's K (or V) is `[num_blocks, kv_head, slot, head_dim]`, contiguous. The checks read shapes,
strides and dtypes only: they never wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAD_SLOT = -1
"""Slot of a token whose K and V are stored nowhere."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256


def check_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Check the arguments of `store_kv`. Raises ValueError naming the argument, its value and the remedy."""
    _check_caches(k_cache, v_cache)
    heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[1] != heads or x.shape[2] != head_dim:
            _fail(name, "shape", tuple(x.shape), f"give [tokens, {heads}, {head_dim}], as the cache has them")
        _check_values(name, x, k_cache)
    if v.shape[0] != k.shape[0]:
        _fail("v", "shape", tuple(v.shape), f"give {k.shape[0]} tokens, as k has")
    _check_index("slots", slots, torch.int64, (k.shape[0],), k_cache.device)


def check_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cache_lens: Tensor) -> None:
    """Check the arguments of `paged_decode`. Raises ValueError naming the argument, its value and the remedy."""
    _check_caches(k_cache, v_cache)
    _check_queries(q, k_cache)
    _check_tables(block_tables, q.shape[0], k_cache.device)
    _check_index("cache_lens", cache_lens, torch.int32, (q.shape[0],), k_cache.device)


def check_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
) -> None:
    """Check the arguments of `paged_prefill`. Raises ValueError naming the argument, its value and the remedy."""
    _check_caches(k_cache, v_cache)
    _check_queries(q, k_cache)
    batch = cache_lens.shape[0] if cache_lens.dim() == 1 else -1
    _check_index("cache_lens", cache_lens, torch.int32, (batch,), k_cache.device)
    _check_index("cu_seqlens", cu_seqlens, torch.int32, (batch + 1,), k_cache.device)
    _check_tables(block_tables, batch, k_cache.device)
    if not isinstance(max_seqlen, int) or not 0 <= max_seqlen <= q.shape[0]:
        _fail("max_seqlen", "value", max_seqlen, f"give the longest request's queries, an int up to {q.shape[0]}")


def check_copy(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Check the arguments of `copy_blocks`. Raises ValueError naming the argument, its value and the remedy."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 5:
            _fail(name, "shape", tuple(cache.shape), "give all layers, [layers, num_blocks, heads, slots, head_dim]")
    _check_caches(k_cache[0], v_cache[0])
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride():
        _fail("v_cache", "shape", tuple(v_cache.shape), f"lay it out as k_cache, {tuple(k_cache.shape)}")
    _check_index("src", src, torch.int64, (src.numel(),), k_cache.device)
    _check_index("dst", dst, torch.int64, (src.numel(),), k_cache.device)


def _check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4:
            _fail(name, "shape", tuple(cache.shape), "give one layer, [num_blocks, heads, slots, head_dim]")
        if cache.dtype not in DTYPES:
            _fail(name, "dtype", cache.dtype, "use float32, float16 or bfloat16")
        if not cache.is_contiguous():
            _fail(name, "stride", cache.stride(), "make the layer contiguous")
    block_size, head_dim = k_cache.shape[2:]
    if block_size not in BLOCK_SIZES:
        _fail("k_cache", "block size", block_size, "use a power of two from 16 to 256")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        _fail("k_cache", "head_dim", head_dim, f"use 1 to {MAX_HEAD_DIM}")
    if v_cache.shape != k_cache.shape:
        _fail("v_cache", "shape", tuple(v_cache.shape), f"lay it out as k_cache, {tuple(k_cache.shape)}")
    _check_like("v_cache", v_cache, k_cache)


def _check_queries(q: Tensor, k_cache: Tensor) -> None:
    heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] == 0 or q.shape[1] % heads:
        _fail("q", "shape", tuple(q.shape), f"give [queries, a multiple of {heads} heads, {head_dim}]")
    _check_values("q", q, k_cache)


def _check_values(name: str, x: Tensor, k_cache: Tensor) -> None:
    _check_like(name, x, k_cache)
    if x.stride(2) != 1 and x.shape[2] != 1:
        _fail(name, "stride", x.stride(), "make its last dimension contiguous")


def _check_like(name: str, x: Tensor, k_cache: Tensor) -> None:
    if x.dtype != k_cache.dtype:
        _fail(name, "dtype", x.dtype, f"convert it to {k_cache.dtype}, as k_cache is")
    if x.device != k_cache.device:
        _fail(name, "device", x.device, f"move it to {k_cache.device}, where k_cache is")


def _check_tables(block_tables: Tensor, batch: int, device: torch.device) -> None:
    width = block_tables.shape[1] if block_tables.dim() == 2 else -1
    _check_index("block_tables", block_tables, torch.int32, (batch, width), device)


def _check_index(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(x.shape) != shape:
        _fail(name, "shape", tuple(x.shape), f"give [{', '.join('any' if n < 0 else str(n) for n in shape)}]")
    if x.dtype != dtype:
        _fail(name, "dtype", x.dtype, f"convert it to {dtype}")
    if x.device != device:
        _fail(name, "device", x.device, f"move it to {device}, where k_cache is")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        _fail(name, "stride", x.stride(), "make its last dimension contiguous")


def _fail(name: str, what: str, value: object, remedy: str) -> None:
    raise ValueError(f"{name} has {what} {value}: {remedy}")
