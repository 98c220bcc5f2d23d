"""Write new K and V into their slots."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import once
from kernels.layout import PAD_SLOT, check_caches, check_numbers, check_values, fail


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write each token's K and V into its slot of each head.

    Args:
        k, v: [T, H, d], last dimension contiguous, of the caches' dtype.
        k_cache, v_cache: [num_blocks, H, b, d], one layer; float32, float16 or bfloat16; written in place.
        slots: int64 [T, H], `block_id * b + offset`, with a stride of 0 where heads share them; -1 stores nothing.
            Two tokens never share a slot of a head.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    check_store(k, v, k_cache, v_cache, slots)
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton()(k, v, k_cache, v_cache, slots)
    else:
        store_kv_torch(k, v, k_cache, v_cache, slots)


def check_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Check the arguments of `store_kv`. Raises ValueError naming the argument, its value and the remedy."""
    check_caches(k_cache, v_cache)
    heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[1] != heads or x.shape[2] != head_dim:
            fail(name, "shape", tuple(x.shape), f"give [tokens, {heads}, {head_dim}], as the cache has them")
        check_values(name, x, k_cache)
    if v.shape[0] != k.shape[0]:
        fail("v", "shape", tuple(v.shape), f"give {k.shape[0]} tokens, as k has")
    check_numbers("slots", slots, torch.int64, (k.shape[0], heads), k_cache.device)


def store_kv_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`store_kv`, token by token and head by head."""
    for token, head in product(*map(range, slots.shape)):
        slot = int(slots[token, head])
        if slot == PAD_SLOT:
            continue
        block, offset = divmod(slot, k_cache.shape[2])
        k_cache[block, head, offset] = k[token, head]
        v_cache[block, head, offset] = v[token, head]


def store_kv_torch(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`store_kv`, all tokens at once."""
    own, heads = once(slots), torch.arange(k_cache.shape[1])
    if not (own >= 0).all():
        stored = slots >= 0
        k, v, own, heads = k[stored], v[stored], slots[stored], stored.nonzero()[:, 1]
    blocks = own.div(k_cache.shape[2], rounding_mode="floor")
    index = blocks, heads, own - blocks * k_cache.shape[2]
    k_cache.index_put_(index, k)
    v_cache.index_put_(index, v)


@cache
def _triton() -> Callable:
    from kernels.store_kv_triton import store_kv_triton

    return store_kv_triton
