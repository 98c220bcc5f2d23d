"""Write a step's K, V and window queries together."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.layout import PAD_SLOT, check_index, check_like, check_values, fail
from kernels.store_kv import check_store, store_kv_reference, store_kv_torch


def store_step(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_cache: Tensor,
    slots: Tensor,
    indices: Tensor,
) -> None:
    """`store_kv`, and each token's queries into its place of a query slot, in one launch.

    Args:
        k, v, k_cache, v_cache, slots: as in `store_kv`.
        q: [T, Hq, d], of the same tokens, head_dim and dtype, last dimension contiguous.
        q_cache: [num_query_slots, w, Hq, d], one layer; written in place. A slot is a ring: the queries of logical
            position p lie at p % w.
        indices: int64 [T], `query_slot * w + p % w`; -1 stores nothing. Two tokens never share a place: of a longer
            chunk of a request, only the last w tokens are stored.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(k, v, q, k_cache, v_cache, q_cache, slots, indices)
    args = k, v, q, k_cache, v_cache, q_cache, slots, indices
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton()(*args)
    else:
        store_step_torch(*args)


def _check(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_cache: Tensor,
    slots: Tensor,
    indices: Tensor,
) -> None:
    """Check the arguments of `store_step`. Raises ValueError naming the argument, its value and the remedy."""
    check_store(k, v, k_cache, v_cache, slots)
    if q_cache.dim() != 4 or 0 in q_cache.shape[1:]:
        fail("q_cache", "shape", tuple(q_cache.shape), "give one layer, [slots, window, heads, head_dim]")
    check_like("q_cache", q_cache, k_cache)
    if not q_cache.is_contiguous():
        fail("q_cache", "stride", q_cache.stride(), "make the layer contiguous")
    heads, head_dim = q_cache.shape[2:]
    if q.dim() != 3 or tuple(q.shape[1:]) != (heads, head_dim):
        fail("q", "shape", tuple(q.shape), f"give [tokens, {heads}, {head_dim}], as the cache has them")
    check_values("q", q, q_cache, "q_cache")
    check_index("indices", indices, torch.int64, (q.shape[0],), q_cache.device, "q_cache")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        fail("q", "shape", tuple(q.shape), f"give {k.shape[0]} tokens of {k.shape[2]} dimensions, as k has")


def store_step_reference(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_cache: Tensor,
    slots: Tensor,
    indices: Tensor,
) -> None:
    """`store_kv`, then the queries, token by token."""
    store_kv_reference(k, v, k_cache, v_cache, slots)
    store_queries_reference(q, q_cache, indices)


def store_queries_reference(q: Tensor, q_cache: Tensor, indices: Tensor) -> None:
    """Write each token's queries into its place of a query slot.

    Args:
        q: [T, Hq, d].
        q_cache: [num_query_slots, w, Hq, d], one layer; written in place. A slot is a ring: the queries of logical
            position p lie at p % w.
        indices: int64 [T], `query_slot * w + p % w`; -1 stores nothing.
    """
    window = q_cache.shape[1]
    for token, index in enumerate(indices.tolist()):
        if index != PAD_SLOT:
            q_cache[index // window, index % window] = q[token]


def store_step_torch(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_cache: Tensor,
    slots: Tensor,
    indices: Tensor,
) -> None:
    """`store_step`, all tokens at once."""
    store_kv_torch(k, v, k_cache, v_cache, slots)
    store_queries_torch(q, q_cache, indices)


def store_queries_torch(q: Tensor, q_cache: Tensor, indices: Tensor) -> None:
    """`store_queries`, all tokens at once."""
    stored = indices >= 0
    if not stored.all():
        q, indices = q[stored], indices[stored]
    q_cache.view(-1, *q_cache.shape[2:]).index_copy_(0, indices, q)


@cache
def _triton() -> Callable:
    from kernels.store_step_triton import store_step_triton

    return store_step_triton
